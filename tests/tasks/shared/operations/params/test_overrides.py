"""Overrides change what they name and nothing else, or nothing at all."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from deepclust.errors import ConfigError
from deepclust.methods.parts.options import TrainedConfig
from tasks.shared.operations import params
from tasks.shared.operations.params import overrides
from tests.paths import ROOT


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    return path


def _changed(before: str, after: str) -> list[str]:
    return [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[:2] in ("- ", "+ ")]


def test_only_the_named_line_changes_and_the_diff_says_so(file: Path) -> None:
    before = file.read_text()
    difference = overrides.apply(["pretrain.shared.batch_size=128"], file)
    assert _changed(before, file.read_text()) == [
        "-     batch_size: 256  # images of an update",
        "+     batch_size: 128  # images of an update",
    ]
    assert "+    batch_size: 128  # images of an update\n" in difference
    assert params.load(file).options("swav").batch_size == 128  # type: ignore[attr-defined]


def test_a_comment_stays_as_far_behind_the_value_as_it_was(file: Path) -> None:
    overrides.apply(["cluster.seeds=3", "data.folder=some/longer/path"], file)
    text = file.read_text()
    assert "\n  seeds: 3  # k-means is fitted" in text
    assert "\n  folder: some/longer/path  # the images" in text


def test_lists_items_and_nested_values_can_be_set_at_once(file: Path) -> None:
    before = file.read_text()
    edits = ["encoders=[pixels, swav]", "pretrain.swav.optimiser.rate=1e-2", "pretrain.swav.crops.1.count=4"]
    edits += ["cluster.k=7", "adapt.tsd.filter_k=null"]
    assert overrides.preview(edits, file).encoders == {"pixels": "pixels", "swav": "swav"}
    assert file.read_text() == before
    overrides.apply(edits, file)
    values = params.load(file)
    assert values.encoders == {"pixels": "pixels", "swav": "swav"}
    assert values.cluster.k == 7
    assert values.adapt.adapter("tsd").filter_k is None  # type: ignore[attr-defined]
    swav = values.options("swav")
    assert isinstance(swav, TrainedConfig)
    assert (swav.optimiser.rate, swav.crops[1].count) == (0.01, 4)
    assert len(_changed(before, file.read_text())) == 2 * len(edits)


def test_the_repositorys_own_file_survives_a_round_trip_unchanged(file: Path) -> None:
    before = file.read_bytes()
    assert overrides.apply([], file) == ""
    assert overrides.apply([f"seed={params.load(file).seed}"], file) == ""
    assert file.read_bytes() == before


def test_a_section_can_differ_from_a_shared_block_in_one_value(file: Path) -> None:
    before = file.read_text()
    edits = ["moco.optimiser.rate=0.3", "moco.crops.0.size=20", "simsiam.batch_size=64", "simsiam.colour.blur=1.0"]
    overrides.apply([f"pretrain.{edit}" for edit in edits], file)
    values = params.load(file)
    moco, simsiam = values.options("moco"), values.options("simsiam")
    assert isinstance(moco, TrainedConfig)
    assert isinstance(simsiam, TrainedConfig)
    assert (moco.optimiser.rate, moco.optimiser.weight_decay) == (0.3, 5e-4)
    assert (moco.crops[0].size, moco.crops[0].scale) == (20, (0.4, 1.0))
    assert (simsiam.batch_size, simsiam.colour.blur, simsiam.colour.jitter) == (64, 1.0, 1.0)
    assert simsiam.crops[0].size == 0.79
    assert [line[2:] for line in _changed(before, file.read_text())] == [
        "    crops:",
        "      - {count: 2, size: 20, scale: [0.4, 1.0], ratio: [1.0, 1.0]}",
        "    optimiser: {rate: 0.3}",
        "    colour: {blur: 1.0}",
        "    batch_size: 64",
    ]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("pretrain.swav.epoch=5", r"^pretrain\.swav\.epoch: unknown parameter; did you mean epochs\?$"),
        (
            "pretrain.swav.optimiser.name=adamw",
            r"^pretrain\.swav\.optimiser\.rate: missing, as are weight_decay, .*betas; ",
        ),
        (
            "pretrain.shared.optimiser.betas=[0.9, 0.9]",
            r"^pretrain\.shared\.optimiser\.betas: unknown parameter of sgd$",
        ),
        ("pretrain.swav.optimiser=adamw", r"^pretrain\.swav\.optimiser: expected a mapping, got 'adamw'$"),
        ("pretrain.swav.epochs=many", r"^pretrain\.swav\.epochs: .*got 'many'$"),
        ("pretrain.swav.crops.7.count=1", r"^pretrain\.swav\.crops\.7: expected an item from 0 to 1, got '7'$"),
        ("seed.x=1", r"^seed\.x: seed is 5 and has no parameters below it$"),
        ("seed", r"^expected an override like pretrain\.swav\.epochs=5, got 'seed'$"),
        ("encoders=[pixels", r"^encoders: expected a YAML value, got '\[pixels'"),
        ("pretrain.pcl.queue_length=1000", r"^pretrain\.pcl: queue_length 1000 must be a multiple of batch_size 64"),
    ],
)
def test_a_wrong_override_is_one_line_and_nothing_is_written(file: Path, edit: str, message: str) -> None:
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=message) as caught:
        overrides.apply(["seed=5", edit], file)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
