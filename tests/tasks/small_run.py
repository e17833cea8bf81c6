"""A whole pipeline on a small folder of images, stage by stage in this process, without tracking."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.shared.operations.params import overrides
from tests.paths import ROOT as REPOSITORY

METHODS = ("swav", "deepcluster_v2", "moco", "pcl", "simsiam")
SHORT = [
    "data.source=folder",
    "data.folder=images",
    "pretrain.shared.image_size=16",
    "pretrain.pixels.image_size=16",
    "cluster.algorithms=[kmeans, spectral]",
    "cluster.primary=kmeans",
    "cluster.how_many.subsamples=2",
    "cluster.seeds=3",
    "cluster.other_k=[4, 7]",
    "cluster.silhouette_images=30",
    "linear.iterations=20",
    "adapt.images=30",
    "adapt.classifiers=[linear, clusters]",
    "adapt.corruptions=[contrast]",
    "adapt.batch_sizes=[16]",
    "report.map_images=12",
    *(f"pretrain.{method}.{edit}" for method in METHODS for edit in ("epochs=2", "batch_size=16")),
    f"encoders=[pixels, random, {', '.join(METHODS)}]",
    "pretrain.swav.prototypes=12",
    "pretrain.deepcluster_v2.prototypes=[12, 12, 12]",
    "pretrain.pcl.clusters=[24, 30]",
    "pretrain.pcl.negatives=8",
    "pretrain.pcl.queue_length=32",
]


def build(root: Path, *, labelled: bool = True, count: int = 96) -> None:
    """Images of three kinds in `root/images`, in class folders or flat, and short parameters."""
    random = np.random.default_rng(0)
    for index in range(count):
        kind = index % 3
        picture = random.integers(0, 60, (20, 18, 3))
        picture[:, 6 * kind : 6 * kind + 6] += 180
        path = root / "images" / (f"kind{kind}/{index:03}.png" if labelled else f"{index:03}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path)
    (root / "domains").mkdir()
    shutil.copy(REPOSITORY / "params.yaml", root)
    overrides.apply(SHORT, root / "params.yaml")


def run(stage: str, monkeypatch: pytest.MonkeyPatch, encoder: str | None = None) -> None:
    """Run one stage as its command line does."""
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    if stage == "prepare":  # the two follow one another
        run("sizes", monkeypatch)
    monkeypatch.setattr(sys, "argv", [f"tasks.{stage}", *([encoder] if encoder else [])])
    importlib.import_module(f"tasks.{stage}.__main__").main()
