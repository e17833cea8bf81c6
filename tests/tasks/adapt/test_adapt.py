"""The stage `adapt` end to end on a small workspace: its files, its numbers, and its reasons where there are none."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.utils.validation import _validate_metric_name as validate_metric_name
from PIL import Image

from deepclust import seeding
from deepclust.adaptation import ADAPTERS, measuring, shifts
from deepclust.corruptions import corrupt
from deepclust.models import encoder as encoders
from deepclust.models.features import to_float
from tasks.adapt import __main__ as adapt
from tasks.adapt import classifiers
from tasks.shared.operations import params, tracking
from tasks.shared.outputs import environment, layout
from tests.tasks import shift_workspace

FILES = ("table.csv", "stream.csv", "predictions.csv")
KINDS = ("linear", "clusters")
FREE, GUARDED = ("source", "bn", "tent", "t3a"), ("bn", "tent", "t3a")


def put_domain(name: str, count: int = 8, *, labelled: bool = True) -> None:
    """Test images made darker, as files of their class or without one."""
    for index, (image, label) in enumerate(zip(*shift_workspace.images_and_labels(count, seed=5), strict=True)):
        path = Path("domains", name, shift_workspace.CLASSES[label] if labelled else "unlabelled", f"{index}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[..., 0] * 0.7).astype(np.uint8)).save(path)


def run(*edits: str, encoder: str = "swav") -> Path:
    """The folder that the stage wrote with other parameters."""
    shift_workspace.overrides.apply(list(edits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["adapt", encoder])
        adapt.main()
    return layout.out("adapt", encoder)


def table(folder: Path, name: str = "table.csv", **wanted: str) -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]


def metrics(encoder: str = "swav") -> dict[str, Any]:
    return json.loads(layout.metrics("adapt", encoder).read_text())


def new_workspace(root: Path, patch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Where the stage has not run yet."""
    patch.chdir(root)
    patch.setenv("DEEPCLUST_TRACKING", "off")
    patch.setattr(environment, "prepare", lambda: None)
    shift_workspace.build(root, edits=["adapt.adapters=[bn, tent, t3a]", "adapt.settings=[reset]"])
    return patch


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return new_workspace(tmp_path, monkeypatch)


logged: dict[str, float] = {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Inside a workspace with a run of both kinds of classifiers in all settings, with two domains."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("whole")
        new_workspace(root, patch)
        patch.setattr(tracking.NullRun, "log_metrics", lambda _, values, step=None: logged.update(values))
        put_domain("dark")
        Image.new("L", (20, 14)).save(root / "domains/dark/a/large.png")
        put_domain("loose", labelled=False)
        (root / "domains/README.md").write_text("Domains.")
        every = ("adapt.settings=[correlated, reset, continual, mixed]", "adapt.classifiers=[linear, clusters]")
        yield run(*every, "adapt.align=false")


def test_the_files_have_their_columns_and_a_row_for_each_adapter_and_shift(whole: Path) -> None:
    found = sorted(path.name for path in whole.iterdir())
    assert found == sorted([*FILES, "lineage.json"]), "the folder of shifts is gone"
    columns = (measuring.COLUMNS, measuring.CURVE, adapt.PREDICTIONS)
    assert [(whole / name).read_text().splitlines()[0].split(",") for name in FILES] == list(columns)
    rows = table(whole)
    size = {"clean": "61", "gaussian_noise": "61", "contrast": "61", "dark": "9", "loose": "8"}
    ways = [*((name, "0") for name in FREE), *((name, "1") for name in GUARDED)]
    keys = [(row["classifier"], row["setting"], row["shift"], row["adapter"], row["guarded"]) for row in rows]
    every = itertools.product(KINDS, shifts.SETTINGS, size, ways)
    expected = [(*key, *way) for *key, way in every if key[1:] != ["correlated", "loose"]]
    assert sorted(keys) == sorted(expected), "without labels there is no order of classes"
    for row in rows:
        labelled = row["shift"] != "loose"
        assert row["images"] == size[row["shift"]]
        assert row["severity"] == ("5" if row["shift"] in ("gaussian_noise", "contrast") else "0")
        assert all(row[name] for name in ("confidence", "entropy", "agreement", "classes_used"))
        assert {bool(row[name]) for name in ("error", "minus_source", "minus_bn")} == {labelled}
        assert bool(row["nmi"]) == (labelled and row["classifier"] == "clusters")
        assert bool(row["guard_right"]) == (row["guarded"] == "1" and labelled and row["classifier"] == "linear")
    # Batches of one stream: 16, 16, 16 and 13 of a shift, 9 and 8 of the domains; 200 mixed images are 12 of 16 and 8.
    batches = [row["setting"] for row in table(whole, "stream.csv", classifier="linear", adapter="source")]
    assert (batches.count("reset"), batches.count("mixed")) == (3 * 4 + 2, 13)
    predicted = [tuple(row.values())[:7] for row in table(whole, "predictions.csv")]
    assert len(predicted) == len(set(predicted)) == 2 * 3 * 7 * 8, "one for each image without a label"
    assert {path for *_, path, _, _ in predicted} == {f"loose/unlabelled/{number}.png" for number in range(8)}
    assert layout.curve("adapt", "swav").read_text() == (whole / "table.csv").read_text()
    seconds = [value for name, value in logged.items() if name.startswith("seconds_per_image.")]
    assert [value > 0 for value in seconds] == [True] * 2 * 4 * 7
    for name in logged:
        validate_metric_name(name)


def test_errors_of_source_are_those_of_the_classifier_on_each_shift_in_every_setting(whole: Path) -> None:
    images, labels = shift_workspace.images_and_labels(61, seed=1)
    order = shifts.choose(labels, count=384, seed=0)
    plain = to_float(torch.from_numpy(images[order]))
    model: Any = classifiers.build("linear", "swav", params.load(), []).model
    for name in ("gaussian_noise", "contrast"):
        shifted = corrupt(plain, name, 5, generator=seeding.generator("adapt", 0, name))
        error = (model((shifted * 255).round() / 255).argmax(1).numpy() != labels[order]).mean()
        assert error > 0.1
        rows = table(whole, classifier="linear", adapter="source", shift=name)
        assert [float(row["error"]) for row in rows] == [pytest.approx(error, abs=1e-5)] * 4
    for row in table(whole, "predictions.csv", classifier="linear", adapter="source"):
        image = torch.from_numpy(np.asarray(Image.open(Path("domains", row["path"]))) / 255).float()
        chances = model(image[None, None]).softmax(1)[0]
        assert row["prediction"] == shift_workspace.CLASSES[int(chances.argmax())]
        assert float(row["confidence"]) == pytest.approx(float(chances.max()), abs=1e-4)


def test_metrics_are_means_over_the_labelled_shifts_of_the_table(whole: Path) -> None:
    rows = [row for row in table(whole) if row["error"]]
    found = metrics()
    first = {"classifier": "linear", "setting": "correlated", "batch_size": 16}
    assert found.items() >= ({"images": 61, "labelled": 61, "not_applicable": {}} | first).items()
    keys = list(found["settings"])
    assert keys == [f"{kind}/{each}/16" for kind in KINDS for each in ("correlated", "reset", "continual", "mixed")]

    def mean(key: str, adapter: str, guarded: int, name: str = "error") -> Any:
        wanted = dict(zip(("classifier", "setting", "batch_size"), key.split("/"), strict=True))
        wanted |= {"adapter": adapter, "guarded": str(guarded)}
        own = [float(row[name]) for row in rows if wanted.items() <= row.items() and row["shift"] != "clean"]
        assert len(own) == 3
        return pytest.approx(np.mean(own), abs=1e-5)

    for key in keys:
        free = {name: mean(key, name, 0) for name in FREE}
        assert found["settings"][key] == free | {f"guarded {name}": mean(key, name, 1) for name in GUARDED}
    assert found["errors"] == {name: mean(keys[0], name, 0) for name in FREE}
    assert found["guarded"] == {name: mean(keys[0], name, 1) for name in GUARDED}
    clean = table(whole, classifier="linear", setting="reset", shift="clean", adapter="source")
    assert [float(row["error"]) for row in clean] == [pytest.approx(found["clean"])]
    guarded = [row for row in rows if row["guarded"] == "1"]
    losses = [mean(key, name, 1, "minus_source").expected for key in keys for name in GUARDED]
    judged = [row for row in guarded if row["guard_right"]]
    right = np.average([float(row["guard_right"]) for row in judged], weights=[int(row["images"]) for row in judged])
    worst = max(float(row["minus_source"]) for row in guarded)
    assert found["guard"] == pytest.approx({"worst": worst, "worst_setting": max(losses), "right": right}, abs=1e-5)


def test_two_runs_write_the_same_bytes_and_leave_the_encoder_as_it_is(new: object) -> None:
    weights = layout.out("pretrain", "swav") / encoders.WEIGHTS

    def contents(align: str) -> list[bytes]:
        edits = ("adapt.settings=[mixed]", "adapt.classifiers=[fine_tuned, clusters]", "adapt.fine_tune.epochs=1")
        folder = run(*edits, "adapt.corruptions=[contrast]", "adapt.images=24", f"adapt.align={align}")
        files = (weights, layout.metrics("adapt", "swav"), layout.curve("adapt", "swav"))
        return [path.read_bytes() for path in (*files, *sorted(folder.iterdir()))]

    before = weights.read_bytes()
    first = contents("true")
    assert contents("true") == first
    assert first[0] == before
    assert contents("false")[1] != first[1], "BatchNorm is aligned where the parameters say so"


def test_an_adapter_that_fails_on_one_stream_of_a_setting_is_left_out_of_all_of_it(new: object) -> None:
    """As `bn` and `tent` do on a batch of one image; with a guard, they answer as the source model there."""
    put_domain("lonely", count=1)
    folder = run("adapt.settings=[reset, continual]")
    for name in ("table.csv", "stream.csv"):
        for setting, there in (("reset", {"source", "t3a"}), ("continual", set(FREE))):
            assert {row["adapter"] for row in table(folder, name, setting=setting, guarded="0")} == there
            assert {row["adapter"] for row in table(folder, name, setting=setting, guarded="1")} == set(GUARDED)
    reasons = metrics()["not_applicable"]
    assert set(reasons) == {"bn, reset, batches of 16", "tent, reset, batches of 16"}
    assert all("at least two images a batch" in reason for reason in reasons.values())


def test_rows_of_batches_and_images_are_written_before_the_next_stream(new: pytest.MonkeyPatch) -> None:
    shift_workspace.unlabel()
    written, follow = [], measuring.follow

    def watched(*given: Any) -> Any:
        files = layout.ARTIFACTS.glob("adapt/.swav.partial/*.csv*")
        written.append(sum(len(file.read_text().splitlines()) for file in files))
        return follow(*given)

    new.setattr(measuring, "follow", watched)
    run("adapt.classifiers=[clusters]")
    # Two lines of columns; 61 predictions and 4 batches of 7 adapters a stream.
    assert written == [2, 2 + 65 * 7, 2 + 2 * 65 * 7]


def test_every_adapter_runs_with_the_repositorys_options_or_says_why_it_can_not(new: object, capsys: Any) -> None:
    rows = table(run(f"adapt.adapters=[{', '.join(ADAPTERS)}]", "adapt.corruptions=[contrast]", "adapt.images=32"))
    assert {row["adapter"] for row in rows} == set(ADAPTERS)
    assert metrics()["not_applicable"] == {}
    rows = table(run("adapt.guard=false", "adapt.images=384", encoder="pixels"))
    assert {(row["adapter"], row["guarded"]) for row in rows} == {("source", "0"), ("t3a", "0"), ("lame", "0")}
    assert "guard" not in metrics("pixels")
    reasons = metrics("pixels")["not_applicable"]
    assert set(reasons) == set(ADAPTERS) - {"source", "t3a", "lame"}
    output = capsys.readouterr().out
    assert f"bn: not applicable: {reasons['bn']}" in output
    assert "adapt.images 384: there are 61 test images to choose from, all are used" in output


def test_without_labels_there_are_indicators_and_predictions_of_clusters_alone(new: object) -> None:
    shift_workspace.unlabel()
    reasons = {"linear": "no labelled training images, so there is no classifier"}
    assert table(run("adapt.classifiers=[linear]")) == []
    nothing = {"images": 61, "labelled": 0, "not_applicable": reasons}
    assert metrics() == nothing | {"reason": "no classifier applies"}
    folder = run("adapt.classifiers=[linear, clusters]", "adapt.settings=[correlated, reset]", "adapt.corruptions=[]")
    found = {(row["classifier"], row["setting"], row["error"], row["nmi"]) for row in table(folder)}
    assert found == {("clusters", "reset", "", "")}
    assert {row["prediction"] for row in table(folder, "predictions.csv")} <= {"0", "1", "2", "3"}
    assert metrics() == nothing | {"reason": "no labelled test images"}
    put_domain("dark")
    measured = [row for row in table(run("adapt.settings=[reset]")) if row["error"] and row["nmi"]]
    assert {row["shift"] for row in measured} == {"dark"}, "a domain's own class folders measure the clusters"
    means = metrics()
    assert [float(row["error"]) for row in measured if row["adapter"] == "source"] == [means["errors"]["source"]]
    assert (means["labelled"], means["clean"]) == (0, None)


def test_an_encoder_beyond_the_budget_has_empty_tables_and_the_reason_and_one_that_is_named_is_measured(
    new: object, capsys: Any
) -> None:
    folder = run("adapt.budget=1.0e-5")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not measured: ")]
    assert said.startswith("not measured: 128 test images of each shift would take about 0.0 minutes of one core, and ")
    assert metrics() == {"images": 0, "labelled": 0, "not_applicable": {}, "reason": said.partition(": ")[2]}
    columns = (measuring.COLUMNS, measuring.CURVE, adapt.PREDICTIONS)
    assert [(folder / name).read_text() for name in FILES] == [",".join(each) + "\n" for each in columns]
    assert layout.curve("adapt", "swav").read_text() == (folder / "table.csv").read_text()
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "lineage.json"])
    assert table(run("adapt.encoders=[swav]")), "whatever it costs"
    assert "at most 128 test images of each shift: about 0.0 minutes of one core" in capsys.readouterr().out
    assert table(run(encoder="pixels")) == []
    assert metrics("pixels")["reason"] == "adapt.encoders does not name it"
