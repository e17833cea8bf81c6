"""The parameters as they stand suit folders of a few images, or are refused in one line that says what to lower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.shared.operations.params import overrides
from tasks.shared.outputs import layout, prepared
from tests.paths import ROOT
from tests.tasks import small_run

SHORT = [
    "data.source=folder",
    "data.folder=images",
    "cluster.seeds=2",
    "linear.iterations=10",
    "adapt.corruptions=[contrast]",
    "adapt.adapters=[source, bn]",
    "adapt.settings=[reset]",
    "pretrain.swav.epochs=2",
    "pretrain.pcl.epochs=2",
]


def _workspace(root: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], *edits: str) -> None:
    """A folder with these images, prepared by the parameters as they stand, but for edits."""
    random = np.random.default_rng(0)
    for name in names:
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 18, 3), dtype=np.uint8)).save(path)
    (root / "domains").mkdir()
    shutil.copy(ROOT / "params.yaml", root)
    monkeypatch.chdir(root)
    overrides.apply([*SHORT, *edits])
    small_run.run("prepare", monkeypatch)


def _through(monkeypatch: pytest.MonkeyPatch, *encoders: str) -> None:
    """All stages after `prepare`."""
    for encoder in encoders:
        for stage in ("pretrain", "embed", "cluster", "linear", "adapt"):
            small_run.run(stage, monkeypatch, encoder)
    small_run.run("report", monkeypatch)


def test_one_image_a_class_goes_through_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = ["encoders=[pixels, pcl]", "pretrain.pcl.batch_size=4", "pretrain.pcl.key_groups=2"]
    _workspace(tmp_path, monkeypatch, [f"class{index:02}/image.png" for index in range(30)], *edits)
    _through(monkeypatch, "pixels", "pcl")
    trained = prepared.count("train")
    assert trained < 30
    for encoder in ("pixels", "pcl"):
        assert json.loads(layout.metrics("cluster", encoder).read_text())["k"] == trained
    assert layout.REPORT.exists()


def test_three_images_in_all_go_through_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _workspace(tmp_path, monkeypatch, [f"{index}.png" for index in range(3)], "encoders=[pixels, random]")
    _through(monkeypatch, "pixels", "random")
    assert layout.REPORT.exists()


FEW = "expected at least 192 images for automatic clusters with batches of 64, got"


@pytest.mark.parametrize(
    ("images", "encoder", "message", "remedy"),
    [
        (
            10,
            "swav",
            "batch_size: expected at most 10, the training images; got 256; lower it",
            ["pretrain.swav.batch_size=10"],
        ),
        (
            10,
            "pcl",
            f"{FEW} 10; lower batch_size to at most 3",
            ["pretrain.pcl.batch_size=3", "pretrain.pcl.key_groups=1"],
        ),
        (1, "swav", "batch_size: expected at most 1, the training images; got 256; add images", []),
        (1, "pcl", f"{FEW} 1; add images, to at least 6", []),
    ],
)
def test_a_batch_larger_than_the_folder_is_one_line_before_any_work_and_its_remedy_works(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    images: int,
    encoder: str,
    message: str,
    remedy: list[str],
) -> None:
    names = ["test/0.png", *(f"train/{index}.png" for index in range(images))]
    _workspace(tmp_path, monkeypatch, names, "pretrain.watchdog=stop")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        small_run.run("pretrain", monkeypatch, encoder)
    assert capsys.readouterr().err == f"error: pretrain.{encoder}: {message}\n"
    assert not layout.out("pretrain", encoder).exists()
    if remedy:
        overrides.apply(remedy)
        small_run.run("pretrain", monkeypatch, encoder)
        assert layout.out("pretrain", encoder).exists()
