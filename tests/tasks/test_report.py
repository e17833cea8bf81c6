"""The report: what it says, that it says it twice alike, and that it needs nothing from outside."""

from __future__ import annotations

import csv
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import fake_workspace
import numpy as np
import pytest

from deepclust.errors import DataError
from tasks import comparison, layout, plots, report, tracking


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(tracking.store.SWITCH, "off")
    monkeypatch.setattr("sys.argv", ["report"])
    return tmp_path


def digest() -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(layout.REPORT.parent.iterdir())}


def html() -> str:
    return layout.REPORT.read_text(encoding="utf-8")


def test_the_report_is_whole_and_the_same_twice(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_workspace.build(workspace, ["swav", "random", "pixels"])
    report.main()
    first = digest()
    assert set(first) == {
        "comparison.csv",
        "report.html",
        "scores.png",
        "training.png",
        *(f"{kind}-{name}.png" for kind in ("map", "gallery", "adaptation") for name in ("pixels", "random", "swav")),
    }
    text = html()
    outside = [url for url in re.findall(r"(?:src|href)=[\"']?([^\"'> ]{1,40})", text) if not url.startswith("data:")]
    assert outside == []
    assert not re.search(r"https?:|@import|url\(|<script", re.sub(r"base64,[^\"]*", "", text))
    assert str(workspace) not in text
    assert "a&lt;b&gt;&amp;.jpg" in text, "names of files are text, not markup"
    for word in ("swav beats pixels and random", "last epoch", "never on the test images", "pretrain.swav.epochs"):
        assert word in text
    assert comparison.comparison_text(comparison.read()) in capsys.readouterr().out
    report.main()
    assert digest() == first


def test_baselines_come_first_and_numbers_are_those_of_the_metrics(workspace: Path) -> None:
    fake_workspace.build(workspace, ["swav", "random", "pixels"])
    report.main()
    rows = comparison.read()
    assert [row["encoder"] for row in rows] == ["pixels", "random", "swav"]
    measured = comparison.stage_metrics("linear", "swav")
    assert float(rows[2]["knn20"]) == pytest.approx(measured["all"]["k20_t0.07"], rel=1e-5)
    assert float(rows[2]["knn200"]) == pytest.approx(measured["all"]["k200_t0.07"], rel=1e-5)
    assert float(rows[2]["error_tsd"]) == pytest.approx(
        comparison.stage_metrics("adapt", "swav")["error"]["tsd"], rel=1e-5
    )
    assert rows[0]["error_bn"] == "", "not applicable to pixels: blank, not zero"
    assert "bn: no batch normalisation" in html()


def test_without_labels_accuracies_are_absent_and_everything_else_is_there(workspace: Path) -> None:
    fake_workspace.build(workspace, ["pixels", "swav"], labelled=False, channels=3, k=100)
    report.main()
    with layout.COMPARISON.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {rows[1][name] for name in ("acc", "nmi", "ari", "knn20", "knn200", "linear", "clean")} == {""}
    assert float(rows[1]["silhouette"]) == pytest.approx(0.2)
    assert "k-means ACC" not in comparison.comparison_text(rows).splitlines()[0]
    text = html()
    assert "No test image has a label" in text
    assert "no labelled training images" in text
    assert {"map-swav.png", "gallery-swav.png"} <= set(digest())


def test_results_of_encoders_that_left_the_list_are_removed(workspace: Path) -> None:
    fake_workspace.build(workspace, ["pixels", "random", "swav", "pcl"])
    text = layout.PARAMS.read_text(encoding="utf-8")
    layout.PARAMS.write_text(text.replace("- pcl\n", ""), encoding="utf-8")
    (layout.out("embed") / ".gitignore").write_text("/swav\n")
    report.main()
    left = {path.name for root in ("artifacts", "metrics", "plots") for path in Path(root).rglob("*")}
    assert {name for name in left if "pcl" in name} == set()
    assert {"swav", "swav.json", "swav.csv", ".gitignore", "prepare.json"} - left <= {"prepare.json"}
    assert "pcl" not in layout.COMPARISON.read_text()


def test_a_missing_stage_is_named_and_nothing_is_written(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_workspace.build(workspace)
    layout.metrics("linear", "swav").unlink()
    with pytest.raises(SystemExit) as stopped:
        report.main()
    assert stopped.value.code == 2
    assert "metrics/linear/swav.json, found none; run `dvc repro linear@swav`" in capsys.readouterr().err
    assert not layout.REPORT.parent.exists()


def row(name: str, knn: float | None, linear: float | None) -> comparison.Row:
    return {"encoder": name, "method": name, "k": 3, "knn20": knn, "linear": linear}


def test_a_method_that_does_not_beat_a_baseline_is_said_so() -> None:
    rows = [row("pixels", 0.8, 0.8), row("random", 0.7, 0.7), row("swav", 0.9, 0.9), row("pcl", 0.75, 0.8)]
    assert comparison.verdict(rows) == [
        "swav beats pixels and random in kNN and linear accuracy.",
        "pcl does NOT beat pixels in kNN 20 (0.750 against 0.800), nor pixels in linear (0.800 against 0.800): "
        "it is not working on this data.",
    ]
    assert comparison.verdict(rows[1:3])[0].startswith("The baseline pixels is not in `encoders`")
    assert "No test image has a label" in comparison.verdict([row("pixels", None, None), row("swav", None, None)])[0]


def test_the_comparison_needs_no_heavy_import() -> None:

    code = (
        "import sys; from tasks import comparison; print({'torch', 'mlflow', 'matplotlib', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=fake_workspace.REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_reading_a_comparison_that_is_not_there_says_what_to_run(workspace: Path) -> None:
    with pytest.raises(DataError, match="dvc repro report"):
        comparison.read()


def test_the_map_keeps_groups_apart_and_survives_a_collapsed_encoder() -> None:
    random = np.random.default_rng(0)
    centres = np.eye(16)[[0] * 40 + [1] * 40] * 10
    found = report.flatten((centres + random.normal(size=centres.shape) * 0.1).astype(np.float32))
    assert found.shape == (80, 2)
    inside = np.linalg.norm(found[:40] - found[:40].mean(axis=0), axis=1).max()
    assert np.linalg.norm(found[:40].mean(axis=0) - found[40:].mean(axis=0)) > 2 * inside
    np.testing.assert_array_equal(report.flatten(np.ones((80, 16), np.float32)), np.zeros((80, 2)))


def test_a_hundred_clusters_have_a_hundred_colours() -> None:
    for count in (2, 10, 20, 100):
        assert len({tuple(np.round(colour, 4)) for colour in plots.palette(count)}) == count
