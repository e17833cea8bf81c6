"""The report: what it says, that it says it twice alike, and that it needs nothing from outside."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import threadpoolctl
import torch
from sklearn.manifold import TSNE

from deepclust.clustering import plane
from deepclust.errors import TrackingError
from tasks.model import register
from tasks.report import __main__ as report
from tasks.report import adaptation_plots, comparison, plots, prune
from tasks.shared.operations import params
from tasks.shared.operations.params import overrides
from tasks.shared.outputs import layout, prepared
from tests.tasks import small_run

NAMES = ("swav", "random", "pixels", "deepcluster_v2")


def digest() -> dict[str, str]:
    files = sorted(path for path in layout.REPORT.parent.iterdir() if path.name != layout.COSTS.name)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def reported(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a report, where `pcl` is not listed any more and the images are somewhere else."""
    root = shutil.copytree(labelled, tmp_path_factory.mktemp("reported") / "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        overrides.apply([f"encoders=[{', '.join(NAMES)}]"])
        overrides.apply(["data.folder=/home/someone/moths", "adapt.domains=/home/someone/sketches"])
        small_run.run("report", patch)
    return root


@pytest.fixture
def here(reported: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(reported)
    return reported


def _has_copies(name: str) -> bool:
    text = (layout.out("cluster", name) / "duplicates.csv").read_text(encoding="utf-8")
    return len(text.splitlines()) > 1


def test_the_report_is_whole_and_needs_nothing_from_outside(here: Path) -> None:
    assert set(digest()) == {
        *("comparison.csv", "evaluation.png", "lineage.json", "report.html", "scores.png", "training.png"),
        *(f"{kind}-{name}.png" for kind in ("map", "gallery", "tree", "unusual") for name in NAMES),
        *(f"duplicates-{name}.png" for name in NAMES if _has_copies(name)),
        *(f"stream-{name}-{index}.png" for index in (0, 1) for name in NAMES),
    }
    text = layout.REPORT.read_text(encoding="utf-8")
    outside = [url for url in re.findall(r"(?:src|href)=[\"']?([^\"'> ]{1,40})", text) if not url.startswith("data:")]
    assert outside == ["costs.js"]
    assert not re.search(
        r"https?:|@import|url\(|<script(?! src=.costs.js.></script>)", re.sub(r"base64,[^\"]*", "", text)
    )
    for word in (
        "no difference between pixels 1.000",
        "baselines both reach 1.000",
        "last epoch",
        "never on the test images",
        "pretrain.swav.epochs",
    ):
        assert word in text
    for folder in ("<td>moths</td>", "<td>sketches</td>", "linear: bn: bn needs BatchNorm layers"):
        assert folder in text
    for name in ("a&lt;b&gt;&amp;.jpg", "<span>&lt;b&gt;a &amp; b</span>"):
        assert name in text, "names of files and domains are text, not markup"
    for private in (str(here), "someone", "<b>a"):
        assert private not in text, "nor is it said where the images are"


def test_a_report_is_the_same_twice_and_results_of_other_encoders_stay_until_prune_deletes_them(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (layout.out("embed") / ".gitignore").write_text("/swav\n")

    def files() -> set[Path]:
        return {path for root in ("artifacts", "metrics", "plots") for path in Path(root).rglob("*") if path.is_file()}

    before, first = files(), digest()
    small_run.run("report", monkeypatch)
    assert digest() == first
    assert comparison.comparison_text(comparison.with_costs(comparison.table())) in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["prune"])
    prune.main()
    said = capsys.readouterr().out
    assert files() == before
    monkeypatch.setattr("sys.argv", ["prune", "--delete"])
    prune.main()
    own = {path for path in before if path.parent.name == "pcl" or path.stem == "pcl"}
    assert before - files() == own - {layout.statistics("pcl")} != set()
    for path in ("artifacts/pretrain/pcl", "metrics/linear/pcl.json", "plots/adapt/pcl.csv"):
        assert f"would remove {path}\n" in said
        assert not Path(path).exists()


def test_baselines_come_first_and_numbers_are_those_of_the_metrics(here: Path) -> None:
    rows = comparison.table()
    assert [row["encoder"] for row in rows] == ["pixels", "random", "swav", "deepcluster_v2"]
    linear, adapted = (comparison.stage_metrics(stage, "swav") for stage in ("linear", "adapt"))
    assert float(rows[2]["knn20"]) == pytest.approx(linear["all"]["k20_t0.07"], rel=1e-5)
    names = [name for name in rows[0] if name.startswith(("clean", "error", "guard"))]
    assert names == ["clean", "error_source", "error_bn", "error_tsd", "guard_worst"], "few adapters"
    assert float(rows[2]["error_tsd"]) == pytest.approx(adapted["errors"]["tsd"], rel=1e-5)
    assert float(rows[2]["guard_worst"]) == pytest.approx(adapted["guard"]["worst_setting"], rel=1e-5)
    assert rows[0]["error_bn"] == "", "not applicable to pixels: blank, not zero"
    assert comparison.shown({"guard_worst": 0.0123}, "guard_worst") == "+0.012"


def test_the_report_says_how_pixels_were_scaled_and_what_was_warned_of_skipped_and_left_out(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = prepared.meta() | {
        "white": {"uint16": [0.0, 4095.0], "int HU": [-1024.0, 3071.0]},
        "ignored": 1234,
        "warnings": ["3 images <b> have several pages"],
        "left_out": [{"path": "train/a.png", "reason": "identical to the test image test/b.png"}] * 201,
    }
    monkeypatch.setattr(prepared, "meta", lambda: meta)
    pictures = {"scores": "scores.png", "training": None, "evaluation": None, "maps": {}, "clusters": {}}
    text = report.render(layout.REPORT.parent, pictures | {"adaptation": {}}, comparison.table(), params.load())
    said = " ".join(re.sub(r"<[^>]*>", " ", text.partition("Data and parameters</h2>")[2]).split())
    assert said.startswith(
        "Classes: kind0, kind1, kind2 Pixels of uint16: 0 is black, 4095 is white "
        "Pixels of int HU: -1024 is black, 3071 is white Other files, ignored: 1,234 "
        "Warning: 3 images &lt;b&gt; have several pages 1 skipped files kind0/a&lt;b&gt;&amp;.jpg"
    )
    assert "201 training images left out train/a.png identical to the test image test/b.png" in said
    assert "and 1 more, in artifacts/prepare/meta.json" in said


def test_an_encoder_that_the_budget_leaves_out_is_shown_with_its_reason_and_blank_in_the_table(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(here, tmp_path / "copy"))
    overrides.apply(["adapt.budget=1.0e-6", "adapt.domains=domains"])
    small_run.run("adapt", monkeypatch, "swav")
    rows = comparison.collect(["swav", "random"])
    assert [row["clean"] is None for row in rows] == [False, True]
    pictures = {"scores": "scores.png", "training": None, "evaluation": None, "maps": {}, "clusters": {}}
    adapted = {str(row["encoder"]): report.adapted(tmp_path, str(row["encoder"]), params.load()) for row in rows}
    text = report.render(layout.REPORT.parent, pictures | {"adaptation": adapted}, rows, params.load())
    said = (
        '<summary>swav</summary>\n<p class="small soft">not measured — adapt: 30 test images of each shift would take'
    )
    assert said in text


def test_the_section_on_adaptation_shows_every_group_the_first_one_unfolded(here: Path) -> None:
    text = layout.REPORT.read_text(encoding="utf-8").partition("Adaptation to shifted images</h2>")[2]
    text = text.partition("<summary>swav</summary>")[2].partition("<summary>deepcluster_v2</summary>")[0]
    assert text.index("<h3>linear, reset, batches of 16</h3>") < text.index("<summary>linear, continual, batches of 16")
    assert re.findall(r"Along the stream: (.*)</h3>", text) == ["linear, continual, batches of 16"]
    for name, means in comparison.stage_metrics("adapt", "swav")["settings"].items():
        line = re.search(rf"<tr><td>{name.replace('/', ', ')}</td>(.*?)</tr>", text)
        assert line is not None
        numbers = re.findall(r"\d+\.\d(?=[ )<])", re.sub(r"<small>.*?</small>", "", line[1]))
        others = [name for name in means if name != "source" and not name.startswith("guarded ")]
        order = ["source", *(f"{guarded}{each}" for each in others for guarded in ("", "guarded "))]
        assert [float(number) for number in numbers] == [pytest.approx(means[each] * 100, abs=0.051) for each in order]
        assert line[1].count("<b>") == list(means.values()).count(min(means.values()))


@pytest.mark.parametrize("width", [40, 80, 120, 400])
def test_a_wide_comparison_goes_on_below_with_costs_and_errors_together(here: Path, width: int) -> None:
    rows = comparison.with_costs(comparison.collect(NAMES))
    blocks = comparison.comparison_text(rows, width).split("\n\n")
    assert max(len(line) for block in blocks for line in block.splitlines()) <= width
    headings = [re.split(r"\s{2,}", block.splitlines()[0])[1:] for block in blocks]
    first, others = ([comparison.title(name) for name in names[1:]] for names in comparison.tables(rows))
    assert list(itertools.chain(*headings)) == first + others, "each column once, in order"
    assert first == ["kind", "cluster ACC", "NMI", "kNN 20", "linear", "kNN held out", *first[6:]]
    assert first[6:] == ["dim", "side", "MB", "minutes", "images/s"]
    if width < 400:
        assert {"clean error", "kNN held out"} <= {heading[0] for heading in headings}
    else:
        assert len(blocks) == 2


def test_the_first_table_says_what_an_encoder_is_worth_and_costs(here: Path) -> None:
    pixels, random, swav, _ = comparison.collect(NAMES)
    assert [row["kind"] for row in (pixels, random, swav)] == ["baseline", "baseline", "from scratch"]
    assert (pixels["dim"], pixels["image_size"], pixels["heldout_images"]) == (16 * 16 * 3, 16, 5)
    assert swav["megabytes"] == (layout.out("pretrain", "swav") / "encoder.safetensors").stat().st_size / 1e6
    assert swav["heldout"] == comparison.stage_metrics("linear", "swav")["knn_heldout"]
    assert comparison.kind("pretrained") == "pretrained"
    assert comparison.shown(swav, "heldout") == "1.000 (.566–1.000)"


def test_evaluation_curves_are_those_of_the_metrics(here: Path) -> None:
    found = {panel.title: panel for panel in report.evaluation_curves(["pixels", "swav"])}
    assert list(found) == ["cluster ACC", "NMI", "kNN, τ = 0.07", "kNN, τ = 0.1"]
    clusters, linear = (comparison.stage_metrics(stage, "swav") for stage in ("cluster", "linear"))
    scores = {3: clusters} | {int(k): scores for k, scores in clusters["other_k"].items()}
    assert found["NMI"].lines["swav"] == [(k, each["nmi"]["mean"], each["nmi"]["std"]) for k, each in scores.items()]
    assert found["kNN, τ = 0.1"].lines["swav"] == [(k, linear["all"][f"k{k}_t0.1"], 0.0) for k in (20, 200)]


def test_without_labels_accuracies_are_absent_and_everything_else_is_there(
    unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shutil.copytree(unlabelled, tmp_path / "copy"))
    rows = comparison.table()
    assert {rows[1][name] for name in ("acc", "nmi", "ari", "knn20", "knn200", "linear", "clean")} == {""}
    text = layout.REPORT.read_text(encoding="utf-8")
    for word in ("No test image has a label", "no labelled training images", "artifacts/adapt/swav/predictions.csv"):
        assert word in text
    for grid in adaptation_plots.INDICATORS.values():
        assert text.count(f"<caption>{grid}</caption>") == 4, "reset and continual, of both encoders"
    assert "Error, percent" not in text
    assert [panel.title for panel in report.evaluation_curves(["pixels", "swav"])] == []
    layout.metrics("linear", "swav").unlink()
    with pytest.raises(SystemExit, match="2"):
        small_run.run("report", monkeypatch)
    assert "metrics/linear/swav.json, found none; run `dvc repro linear@swav`" in capsys.readouterr().err


def test_a_number_that_is_logged_late_is_drawn_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = layout.out("pretrain", "pcl") / "history.csv"
    path.parent.mkdir(parents=True)
    path.write_text("step,epoch,loss,proto_nce,never\n9,0,3.5,,\n19,1,2.5,7.5,\n")
    assert report.history("pcl") == {"loss": [(9, 3.5), (19, 2.5)], "proto_nce": [(19, 7.5)]}


def test_a_run_of_one_logged_step_is_drawn_as_a_point(recwarn: pytest.WarningsRecorder) -> None:
    (axis,) = plots.training({"swav": {"loss": [(0, 2.5)]}}).axes
    assert axis.lines[0].get_marker() == "."
    assert not recwarn.list


def test_a_lost_server_costs_the_registration_and_not_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(register, "register", Mock(side_effect=TrackingError("no store")))
    report.register_all(["swav", "pcl"], "run")
    warning = "warning: not all models are registered, `python -m tasks.register` does it (no store)\n"
    assert capsys.readouterr().err == warning


def test_the_map_keeps_groups_apart_on_one_thread_and_survives_a_collapsed_encoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, fit = set(), TSNE.fit_transform

    def watched(self: TSNE, points: np.ndarray) -> np.ndarray:
        threads.update(library["num_threads"] for library in threadpoolctl.threadpool_info())
        return fit(self, points)

    monkeypatch.setattr(TSNE, "fit_transform", watched)
    random = np.random.default_rng(0)
    centres = np.eye(16)[[0] * 40 + [1] * 40] * 10
    with threadpoolctl.threadpool_limits(2):
        scattered = centres + random.normal(size=centres.shape) * 0.1
        found = plane.flatten(torch.from_numpy(scattered.astype(np.float32)), perplexity=30.0)
    assert threads == {1}
    inside = np.linalg.norm(found[:40] - found[:40].mean(axis=0), axis=1).max()
    assert np.linalg.norm(found[:40].mean(axis=0) - found[40:].mean(axis=0)) > 2 * inside
    np.testing.assert_array_equal(plane.flatten(torch.ones(80, 16), perplexity=30.0), np.zeros((80, 2)))
