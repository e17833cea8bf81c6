"""The stage `adapt` end to end on a small workspace: its files and settings, and what it says where nothing is."""

from __future__ import annotations

import csv
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from mlflow.utils.validation import _validate_metric_name as validate_metric_name
from PIL import Image

from deepclust import seeding
from deepclust.adaptation import ADAPTERS, measuring, shifts
from deepclust.corruptions import CORRUPTIONS, corrupt
from deepclust.errors import AdaptationError, ConfigError
from deepclust.models import encoder as encoders
from deepclust.models.features import to_float
from tasks.adapt import __main__ as adapt
from tasks.adapt import classifiers
from tasks.shared.operations import params, tracking
from tasks.shared.operations.params import adapt as schema
from tasks.shared.outputs import environment, layout, stage
from tests.tasks import shift_workspace

Row = dict[str, str]
Run = Callable[..., Path]
QUICK = ["adapt.adapters=[bn, tent, t3a]"]
FILES = ("table.csv", "stream.csv", "predictions.csv", "seconds.csv")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    monkeypatch.setattr(environment, "prepare", lambda: None)
    shift_workspace.build(tmp_path, edits=QUICK)
    return tmp_path


@pytest.fixture
def run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the stage with other parameters; the folder it wrote."""

    def main(*edits: str, encoder: str = "swav") -> Path:
        shift_workspace.overrides.apply(list(edits))
        monkeypatch.setattr(sys, "argv", ["adapt", encoder])
        adapt.main()
        return layout.out("adapt", encoder)

    return main


def table(folder: Path, name: str = "table.csv") -> list[Row]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def metrics(encoder: str = "swav") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(layout.metrics("adapt", encoder).read_text())
    return found


def put_domain(folder: Path, count: int = 8) -> None:
    """Test images made darker, as files of their class."""
    images, labels = shift_workspace.images_and_labels(count, seed=5)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / shift_workspace.CLASSES[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[..., 0] * 0.7).astype(np.uint8)).save(path)


def test_the_files_have_their_columns_and_a_row_for_each_adapter_and_shift(run: Run) -> None:
    folder = run("adapt.settings=[reset, continual, mixed, correlated]")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES), "the folder of shifts is gone"
    columns = (measuring.COLUMNS, measuring.CURVE, adapt.PREDICTIONS, adapt.SECONDS)
    for name, expected in zip(FILES, columns, strict=True):
        assert (folder / name).read_text().splitlines()[0].split(",") == expected
    rows = table(folder)
    met = [("clean", "0"), ("gaussian_noise", "5"), ("contrast", "5")]
    ways = [*((name, "0") for name in ("source", "bn", "tent", "t3a")), ("bn", "1"), ("tent", "1"), ("t3a", "1")]
    keys = [(row["setting"], row["shift"], row["severity"], row["adapter"], row["guarded"]) for row in rows]
    assert sorted(keys) == sorted(
        (setting, *shift, *way) for setting in shifts.SETTINGS for shift in met for way in ways
    )
    always = ("error", "minus_source", "minus_bn", "confidence", "entropy", "agreement", "classes_used")
    assert all(row[name] != "" for row in rows for name in always)
    assert all((row["by_adapter"] != "") == (row["guarded"] == "1") == (row["guard_right"] != "") for row in rows)
    assert {row["images"] for row in rows} == {"61"}
    assert {row["classifier"] for row in rows} == {"linear"}
    assert {row["batch_size"] for row in rows} == {"16"}
    assert table(folder, "predictions.csv") == []
    # Batches: 16, 16, 16, 13 of a shift; of the 183 images of one stream 11 of 16 and 7.
    curve = table(folder, "stream.csv")
    count = {setting: sum(row["setting"] == setting for row in curve) for setting in shifts.SETTINGS}
    assert count == {"reset": 7 * 12, "continual": 7 * 12, "mixed": 7 * 12, "correlated": 7 * 12}
    assert {row["shift"] for row in curve if row["setting"] == "mixed"} == {"mixed"}
    seconds = table(folder, "seconds.csv")
    assert len(seconds) == 4 * 7
    assert all(float(row["seconds_per_image"]) > 0 for row in seconds)
    assert layout.curve("adapt", "swav").read_text() == (folder / "table.csv").read_text()


def test_errors_of_source_are_those_of_the_classifier_on_each_shift_in_every_setting(run: Run) -> None:
    rows = table(run("adapt.settings=[reset, continual, mixed, correlated]", "adapt.align=false"))
    images, labels = shift_workspace.images_and_labels(61, seed=1)
    order = shifts.choose(labels, count=384, seed=0)
    plain = to_float(torch.from_numpy(images[order]))
    model = classifiers.build("linear", "swav", params.load(), []).model
    assert model is not None
    found = {(row["setting"], row["shift"]): float(row["error"]) for row in rows if row["adapter"] == "source"}
    for name in ("clean", "gaussian_noise", "contrast"):
        shifted = plain
        if name != "clean":
            shifted = corrupt(plain, name, 5, generator=seeding.generator("adapt", 0, name))
            shifted = (shifted * 255).round() / 255
        with torch.no_grad():
            error = (model(shifted).argmax(1).numpy() != labels[order]).mean()
        assert error > 0.1
        for setting in shifts.SETTINGS:
            assert found[setting, name] == pytest.approx(error, abs=1e-5)


def test_metrics_are_means_over_the_shifts_of_the_table(run: Run) -> None:
    rows = table(run("adapt.settings=[correlated, reset]", "adapt.batch_sizes=[16, 20]"))
    found = metrics()
    assert (found["images"], found["labelled"], found["not_applicable"]) == (61, 61, {})
    assert (found["classifier"], found["setting"], found["batch_size"]) == ("linear", "correlated", 16)

    def mean(setting: str, size: int, adapter: str, guarded: int, name: str = "error") -> float:
        wanted = {"setting": setting, "batch_size": str(size), "adapter": adapter, "guarded": str(guarded)}
        own = [float(row[name]) for row in rows if wanted.items() <= row.items() and row["shift"] != "clean"]
        assert len(own) == 2
        return float(np.mean(own))

    assert set(found["errors"]) == {"source", "bn", "tent", "t3a"}
    assert set(found["guarded"]) == {"bn", "tent", "t3a"}
    for adapter, error in found["errors"].items():
        assert error == pytest.approx(mean("correlated", 16, adapter, 0), abs=1e-5)
    for adapter, error in found["guarded"].items():
        assert error == pytest.approx(mean("correlated", 16, adapter, 1), abs=1e-5)
    assert list(found["settings"]) == [
        *("linear/correlated/16", "linear/correlated/20", "linear/reset/16", "linear/reset/20")
    ]
    assert found["settings"]["linear/reset/20"]["tent"] == pytest.approx(mean("reset", 20, "tent", 0), abs=1e-5)
    assert found["settings"]["linear/reset/20"]["guarded t3a"] == pytest.approx(mean("reset", 20, "t3a", 1), abs=1e-5)
    (clean,) = (
        float(row["error"])
        for row in rows
        if (row["setting"], row["batch_size"], row["shift"], row["adapter"]) == ("reset", "16", "clean", "source")
    )
    assert found["clean"] == pytest.approx(clean)
    guarded = [row for row in rows if row["guarded"] == "1"]
    assert found["guard"]["worst"] == pytest.approx(max(float(row["minus_source"]) for row in guarded), abs=1e-5)
    worst = max(
        mean(setting, size, adapter, 1, "minus_source")
        for setting in ("correlated", "reset")
        for size in (16, 20)
        for adapter in ("bn", "tent", "t3a")
    )
    assert found["guard"]["worst_setting"] == pytest.approx(worst, abs=1e-5)
    assert found["guard"]["right"] == pytest.approx(np.mean([float(row["guard_right"]) for row in guarded]), abs=1e-5)


def test_two_runs_write_the_same_bytes_but_for_the_seconds(run: Run) -> None:
    edits = [
        *("adapt.settings=[mixed]", "adapt.classifiers=[fine_tuned, clusters]", "adapt.fine_tune.epochs=1"),
        *("adapt.corruptions=[contrast]", "adapt.images=24"),
    ]

    def written() -> dict[str, bytes]:
        files = [
            *(run(*edits) / name for name in FILES),
            layout.metrics("adapt", "swav"),
            layout.curve("adapt", "swav"),
        ]
        return {str(file): file.read_bytes() for file in files if file.name != "seconds.csv"}

    first = written()
    assert len(first) == 5
    assert written() == first


def test_reset_begins_each_shift_afresh_and_continual_goes_on(run: Run) -> None:
    def last(*edits: str) -> dict[tuple[str, str], str]:
        rows = table(run("adapt.tent.rate=0.05", *edits))
        return {
            (row["setting"], row["adapter"]): row["entropy"]
            for row in rows
            if row["shift"] == "contrast" and row["guarded"] == "0"
        }

    both = last("adapt.settings=[reset, continual]")
    alone = last("adapt.corruptions=[contrast]", "adapt.settings=[reset]")
    assert {key: both[key] for key in alone} == alone
    assert both["continual", "tent"] != both["reset", "tent"]
    assert both["continual", "bn"] != "", "the last batches of continual streams span shifts"


def test_batches_of_one_take_out_what_needs_more_and_the_guarded_ones_answer_as_source(run: Run) -> None:
    rows = table(run("adapt.batch_sizes=[1, 16]", "adapt.corruptions=[contrast]", "adapt.images=20"))
    single = [row for row in rows if row["batch_size"] == "1"]
    assert {row["adapter"] for row in single if row["guarded"] == "0"} == {"source", "t3a"}
    assert {row["adapter"] for row in rows if row["batch_size"] == "16"} == {"source", "bn", "tent", "t3a"}
    assert not any(row["minus_bn"] for row in single)
    for row in single:
        if row["guarded"] == "1" and row["adapter"] in ("bn", "tent"):
            assert (row["by_source"], row["agreement"], row["minus_source"]) == ("1.0", "1.0", "0.0")
    reasons = metrics()["not_applicable"]
    assert set(reasons) == {"bn, reset, batches of 1", "bn, correlated, batches of 1"} | {
        "tent, reset, batches of 1",
        "tent, correlated, batches of 1",
    }
    assert all("at least two images a batch" in reason for reason in reasons.values())


def test_an_adapter_that_fails_on_one_stream_of_a_setting_is_left_out_of_all_of_it(run: Run, workspace: Path) -> None:
    put_domain(workspace / "domains" / "lonely", count=1)
    folder = run("adapt.settings=[reset, continual]")
    rows = table(folder)
    assert "lonely" in {row["shift"] for row in rows}
    for setting, there in (("reset", {"source", "t3a"}), ("continual", {"source", "bn", "tent", "t3a"})):
        own = [row for row in rows if row["setting"] == setting]
        assert {row["adapter"] for row in own if row["guarded"] == "0"} == there
        assert {row["adapter"] for row in own if row["guarded"] == "1"} == {"bn", "tent", "t3a"}
    for name in ("stream.csv", "seconds.csv"):
        left = {row["adapter"] for row in table(folder, name) if row["setting"] == "reset" and row["guarded"] == "0"}
        assert left == {"source", "t3a"}
    assert set(metrics()["not_applicable"]) == {"bn, reset, batches of 16", "tent, reset, batches of 16"}


def test_a_long_table_is_that_of_all_rows_at_once_without_those_of_adapters_that_failed(tmp_path: Path) -> None:
    columns = ["path", "adapter", "guarded", "error"]
    rows = [
        {"path": path, "adapter": name, "guarded": guarded, "error": error}
        for path in ('a "b", c.png', "two\nlines.png", "plain.png")
        for name, guarded, error in (("bn", 0, 1 / 3), ("bn", 1, 1e-7), ("tent", 0, None))
    ]
    table = adapt.LongTable(tmp_path / "long.csv", columns)
    table.add(rows[:4])
    table.add(row for row in rows[4:])
    table.settle([])
    table.add(rows[:3])
    table.add(rows[3:5])
    table.settle({"bn": "why"})
    table.close()
    expected = rows + [row for row in rows[:5] if row["guarded"] or row["adapter"] != "bn"]
    assert len(expected) == 9 + 3
    assert (tmp_path / "long.csv").read_bytes().decode() == stage.table(expected, columns)
    assert [path.name for path in tmp_path.iterdir()] == ["long.csv"]


def test_rows_of_batches_and_images_are_written_before_the_next_stream(
    run: Run, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift_workspace.unlabel()
    written: list[int] = []
    follow = measuring.follow

    def watched(*given: Any) -> Any:
        files = layout.ARTIFACTS.glob("adapt/.swav.partial/*.csv*")
        written.append(sum(len(file.read_text().splitlines()) for file in files))
        return follow(*given)

    monkeypatch.setattr(measuring, "follow", watched)
    run("adapt.classifiers=[clusters]", "adapt.settings=[reset]")
    # Two lines of columns; 61 predictions and 4 batches of 7 adapters a stream.
    assert written == [2, 2 + 65 * 7, 2 + 2 * 65 * 7]


def test_pixels_have_what_needs_no_parameters_and_reasons_for_the_rest(run: Run, capsys: Any) -> None:
    every = "[" + ", ".join(get_args(schema.AdapterName)) + "]"
    rows = table(run(f"adapt.adapters={every}", "adapt.settings=[reset]", encoder="pixels"))
    assert {row["adapter"] for row in rows} == {"source", "t3a", "lame"}
    reasons = metrics("pixels")["not_applicable"]
    assert set(reasons) == {"bn", "tent", "pseudo_label", "shot_im", "tsd", "rotta", "roid"}
    assert "BatchNorm" in reasons["bn"]
    assert f"bn: not applicable: {reasons['bn']}" in capsys.readouterr().out


def test_every_adapter_runs_with_the_repositorys_options(run: Run) -> None:
    every = "[" + ", ".join(get_args(schema.AdapterName)) + "]"
    edits = (f"adapt.adapters={every}", "adapt.settings=[reset]", "adapt.corruptions=[contrast]", "adapt.images=32")
    rows = table(run(*edits))
    assert {row["adapter"] for row in rows} == set(get_args(schema.AdapterName)) == set(ADAPTERS)
    assert metrics()["not_applicable"] == {}


def test_a_domain_is_one_more_shift_of_every_setting(run: Run, workspace: Path) -> None:
    put_domain(workspace / "domains" / "dark")
    Image.new("L", (20, 14)).save(workspace / "domains" / "dark" / "a" / "large.png")
    (workspace / "domains" / "README.md").write_text("Domains.")
    rows = table(run("adapt.settings=[reset, mixed, correlated]", "adapt.images=40"))
    dark = [row for row in rows if row["shift"] == "dark"]
    assert {(row["severity"], row["images"]) for row in dark} == {("0", "9")}
    assert {row["setting"] for row in dark} == {"reset", "mixed", "correlated"}
    source = [float(row["error"]) for row in rows if row["setting"] == "reset" and row["adapter"] == "source"]
    assert metrics()["errors"]["source"] == pytest.approx(np.mean(source[1:]), abs=1e-5)


def test_a_domain_without_labels_has_indicators_and_a_prediction_of_each_image(run: Run, workspace: Path) -> None:
    put_domain(workspace / "domains" / "dark" / "unlabelled")
    for path in (workspace / "domains/dark/unlabelled").glob("*/*.png"):
        path.rename(path.parents[1] / path.name)
    folder = run("adapt.settings=[mixed, correlated]")
    dark = [row for row in table(folder) if row["shift"] == "dark"]
    assert {row["setting"] for row in dark} == {"mixed"}
    assert len(dark) == 7
    assert all(row["error"] == row["minus_bn"] == row["guard_right"] == "" for row in dark)
    assert all(row["agreement"] and row["confidence"] for row in dark)
    predictions = table(folder, "predictions.csv")
    keys = [(row["adapter"], row["guarded"], row["path"]) for row in predictions]
    assert len(keys) == len(set(keys)) == 7 * 8
    assert {row["path"] for row in predictions} == {f"dark/unlabelled/{number}.png" for number in range(8)}
    assert {row["prediction"] for row in predictions} <= set(shift_workspace.CLASSES)
    model = classifiers.build("linear", "swav", params.load(), []).model
    assert model is not None
    for row in predictions:
        if row["adapter"] == "source":
            image = np.asarray(Image.open(workspace / "domains" / row["path"]))
            chances = model(torch.from_numpy(image / 255).float()[None, None]).softmax(1)[0]
            assert row["prediction"] == shift_workspace.CLASSES[int(chances.argmax())]
            assert float(row["confidence"]) == pytest.approx(float(chances.max()), abs=1e-4)


def test_without_any_label_there_are_indicators_and_predictions_of_clusters_alone(run: Run, workspace: Path) -> None:
    shift_workspace.unlabel()
    folder = run("adapt.classifiers=[linear, clusters]", "adapt.settings=[correlated, reset]")
    rows = table(folder)
    assert {(row["classifier"], row["setting"]) for row in rows} == {("clusters", "reset")}
    assert not any(row[name] for row in rows for name in ("error", "minus_source", "minus_bn", "nmi", "guard_right"))
    assert all(row["agreement"] and row["classes_used"] for row in rows)
    predictions = table(folder, "predictions.csv")
    assert len(predictions) == 3 * 61 * 7
    assert {row["prediction"] for row in predictions} <= {"0", "1", "2", "3"}
    assert {row["path"] for row in predictions} == {f"test/{index:03}.png" for index in range(61)}
    found = metrics()
    assert found["reason"] == "no labelled test images"
    assert (found["images"], found["labelled"]) == (61, 0)
    assert found["not_applicable"] == {"linear": "no labelled training images, so there is no classifier"}


def test_a_domain_with_class_folders_measures_clusters_where_the_data_have_no_labels(run: Run, workspace: Path) -> None:
    shift_workspace.unlabel()
    put_domain(workspace / "domains" / "dark")
    rows = table(run("adapt.classifiers=[linear, clusters]", "adapt.settings=[reset]", "adapt.corruptions=[]"))
    assert {row["classifier"] for row in rows} == {"clusters"}
    assert {row["shift"] for row in rows if row["error"] and row["nmi"]} == {"dark"}
    assert {row["shift"] for row in rows if not row["error"] and not row["nmi"]} == {"clean"}
    found = metrics()
    (source,) = (float(row["error"]) for row in rows if (row["shift"], row["adapter"]) == ("dark", "source"))
    assert found["errors"]["source"] == pytest.approx(source)
    assert (found["labelled"], found["clean"]) == (0, None)


def test_the_reason_tells_whether_classifier_or_labels_are_missing(run: Run) -> None:
    shift_workspace.unlabel()
    folder = run()
    assert [table(folder, name) for name in FILES] == [[]] * 4
    assert metrics()["reason"] == "no classifier applies"
    run("adapt.classifiers=[clusters]", "adapt.settings=[correlated]")
    assert metrics()["reason"] == "no labelled test images"


def test_clusters_of_labelled_images_are_measured_by_matching(run: Run) -> None:
    rows = table(run("adapt.classifiers=[linear, clusters]", "adapt.settings=[reset]"))
    assert {row["classifier"] for row in rows} == {"linear", "clusters"}
    clusters = [row for row in rows if row["classifier"] == "clusters"]
    assert all(row["nmi"] and row["error"] and not row["guard_right"] for row in clusters)
    assert not any(row["nmi"] for row in rows if row["classifier"] == "linear")
    assert set(metrics()["settings"]) == {"linear/reset/16", "clusters/reset/16"}


def test_without_corruptions_and_domains_there_is_clean_alone(run: Run) -> None:
    rows = table(run("adapt.corruptions=[]"))
    assert {row["shift"] for row in rows} == {"clean"}
    found = metrics()
    assert found["errors"] == found["guarded"] == found["settings"] == {}
    assert found["guard"]["worst_setting"] is None


def test_without_guards_there_are_no_numbers_of_them(run: Run) -> None:
    rows = table(run("adapt.guard=false", "adapt.settings=[reset]"))
    assert {row["guarded"] for row in rows} == {"0"}
    assert "guard" not in metrics()
    assert metrics()["guarded"] == {}


def test_alignment_lets_bn_agree_with_source_on_clean_images_and_leaves_source_as_it_is(run: Run) -> None:
    """The encoder's running statistics are those of darker images."""

    def clean(align: str) -> dict[str, Row]:
        rows = table(run(f"adapt.align={align}", "adapt.settings=[reset]", "adapt.batch_sizes=[61]"))
        return {row["adapter"]: row for row in rows if row["shift"] == "clean" and row["guarded"] == "0"}

    before, after = clean("false"), clean("true")
    assert float(after["bn"]["agreement"]) > float(before["bn"]["agreement"]) + 0.2
    assert after["source"]["error"] == before["source"]["error"]
    assert float(after["source"]["confidence"]) == pytest.approx(float(before["source"]["confidence"]), abs=1e-5)


def test_fewer_images_are_the_beginning_of_the_choice_and_too_few_are_said(run: Run, capsys: Any) -> None:
    rows = table(run("adapt.images=10", "adapt.corruptions=[]"))
    assert {row["images"] for row in rows} == {"10"}
    assert "adapt.images" not in capsys.readouterr().out
    run("adapt.images=384")
    assert "adapt.images 384: there are 61 test images to choose from, all are used" in capsys.readouterr().out


def test_the_names_of_all_logged_numbers_are_ones_that_mlflow_takes(
    run: Run, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, float] = {}

    class Recorder(tracking.NullRun):
        def log_metrics(self, values: Any, step: int | None = None) -> None:
            logged.update(values)

    monkeypatch.setattr(tracking, "NullRun", Recorder)
    run("adapt.classifiers=[linear, clusters]", "adapt.batch_sizes=[1, 16]", "adapt.images=6")
    assert any(name.startswith("settings.") for name in logged)
    assert any(name.startswith("seconds_per_image.") for name in logged)
    for name in logged:
        validate_metric_name(name)


def test_a_missing_classifier_stops_the_stage_with_one_line_and_no_outputs(run: Run, capsys: Any) -> None:
    (layout.out("linear", "swav") / "classifier.json").unlink()
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: expected a classifier in artifacts/lin")
    assert not layout.out("adapt", "swav").exists()
    assert not list(layout.ARTIFACTS.rglob("*.partial"))


def test_the_source_images_are_a_seeded_choice_of_training_images(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.load(layout.split("train") / "images.npy")
    monkeypatch.setattr(adapt, "SOURCE_IMAGES", 40)
    monkeypatch.setattr(adapt, "SOURCE_BATCH", 16)
    one, same, other = (list(adapt.source_batches(seed)) for seed in (0, 0, 1))
    assert [len(batch) for batch in one] == [16, 16, 8]
    assert all(torch.equal(left, right) for left, right in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    pictures = {image.tobytes() for image in images}
    found = [(image[0].numpy() * 255).round().astype(np.uint8) for batch in one for image in batch]
    assert {image[..., None].tobytes() for image in found} <= pictures
    assert len({image.tobytes() for image in found}) == 40


SECTIONS = {
    name: info.annotation
    for name, info in schema.Adapt.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, schema.Common)
}


def test_every_adapter_but_source_has_a_section() -> None:
    assert set(SECTIONS) == set(ADAPTERS) - {"source"} == set(get_args(schema.AdapterName)) - {"source"}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_has_exactly_its_adapters_options(name: str) -> None:
    signature = inspect.signature(ADAPTERS[name])
    known = {each.name for each in signature.parameters.values() if each.kind is each.KEYWORD_ONLY}
    if name == "tsd":  # single deviations are for the library
        known -= set(inspect.signature(ADAPTERS[name]).parameters) & {
            *("normalise", "target", "divergence", "consistency_filter", "empty_classes", "local_compares"),
            *("local_itself", "local_repels", "train_mode", "seed"),
        }
    assert set(SECTIONS[name].model_fields) == known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compat": "original", "local_weight": 0.1},
            "^adapt.tsd: compat 'original' means local_weight 0, got 0.1; make",
        ),
        (
            {"compat": "original", "steps": 2},
            "^adapt.tsd: compat 'original' means steps 1, got 2; make it 1, or compat",
        ),
        ({"compat": "original", "episodic": True}, "^adapt.tsd: .* means episodic False, got True"),
        ({"compat": "original", "predict": "after"}, "^adapt.tsd: .* means predict before, got after"),
        ({"compat": "original", "filter_k": None}, "^adapt.tsd: .* can not keep all members; give filter_k"),
        ({"compat": "original", "parameters": "head"}, "^adapt.tsd: .* no gradient reaches parameters head"),
        ({"local_weight": 0.0, "parameters": "head"}, "^adapt.tsd: .* no gradient reaches parameters head"),
        ({"affinity": "linear", "neighbours": 5}, "^adapt.lame: affinity 'linear' has no neighbours, got 5"),
        ({"compat": "original"}, None),
        ({"compat": "original", "local_weight": 0.0, "filter_k": 7}, None),
        ({"local_weight": 0.0, "filter_k": None, "steps": 2, "episodic": True, "predict": "after"}, None),
        ({"parameters": "head"}, None),
        ({"affinity": "linear"}, None),
        ({"affinity": "rbf", "neighbours": 3}, None),
    ],
)
def test_options_that_contradict_each_other_are_refused_as_parameters_where_the_adapter_would_refuse_them(
    workspace: Path, options: dict[str, Any], message: str | None
) -> None:
    """Left to the adapter, it would be absent from the table, and everything else measured."""
    name = "lame" if "affinity" in options else "tsd"
    raw = yaml.safe_load((workspace / "params.yaml").read_text())
    raw["adapt"][name] |= options
    model = shift_workspace.classifier_of("small")
    if message is None:
        values = getattr(params.parse(raw).adapt, name).model_dump()
        assert values.items() >= options.items()
        ADAPTERS[name](model, **values)
    else:
        with pytest.raises(ConfigError, match=message):
            params.parse(raw)
        with pytest.raises(AdaptationError):
            ADAPTERS[name](model, **raw["adapt"][name])


def test_corruptions_of_the_parameters_are_those_there_are() -> None:
    assert set(get_args(schema.Corruption)) == set(CORRUPTIONS)
    assert set(get_args(schema.Adapt.model_fields["settings"].annotation)[0].__args__) == set(shifts.SETTINGS)


def test_options_are_those_of_the_parameters(workspace: Path) -> None:
    raw = yaml.safe_load((workspace / "params.yaml").read_text())["adapt"]
    values = params.load().adapt.model_copy(update={"adapters": tuple(ADAPTERS)})
    found = adapt.options_of(values)
    assert list(found) == list(ADAPTERS)
    assert found["source"] == {}
    for name in SECTIONS:
        assert found[name] == {key: float(value) if key == "rate" else value for key, value in raw[name].items()}


def test_the_saved_encoder_is_not_changed_by_alignment_and_fine_tuning(run: Run) -> None:
    before = (layout.out("pretrain", "swav") / encoders.WEIGHTS).read_bytes()
    run("adapt.classifiers=[fine_tuned]", "adapt.fine_tune.epochs=1", "adapt.settings=[reset]", "adapt.images=20")
    assert (layout.out("pretrain", "swav") / encoders.WEIGHTS).read_bytes() == before
