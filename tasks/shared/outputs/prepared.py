"""Reading what `prepare` wrote."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepclust.errors import DataError
from tasks.shared.outputs import layout


@dataclass(frozen=True)
class Split:
    """One prepared split.

    Attributes:
        images: (N, H, W, C) uint8, memory-mapped.
        labels: (N,) int64, -1 where unknown.
        paths: N paths relative to the source.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    paths: list[str]


def images(split: str) -> NDArray[np.uint8]:
    """The images of a split, memory-mapped. Raises: DataError if they are missing."""
    array: NDArray[np.uint8] = np.load(_there(layout.split(split) / "images.npy"), mmap_mode="r", allow_pickle=False)
    return array


def labels(split: str) -> NDArray[np.int64]:
    """The labels of a split. Raises: DataError if they are missing."""
    array: NDArray[np.int64] = np.load(_there(layout.split(split) / "labels.npy"), allow_pickle=False)
    return array


def heldout() -> NDArray[np.int64]:
    """Indices of the labelled training images that are held out. Raises: DataError if they are missing."""
    array: NDArray[np.int64] = np.load(_there(layout.split("train") / "heldout.npy"), allow_pickle=False)
    return array


def load(split: str) -> Split:
    """A whole split. Raises: DataError if a file is missing."""
    with _there(layout.split(split) / "items.csv").open(encoding="utf-8", newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    return Split(images(split), labels(split), paths)


def statistics() -> dict[str, Any]:
    """Image size, channels, resize, mean and std. Raises: DataError if they are missing."""
    value: dict[str, Any] = json.loads(_there(layout.STATISTICS).read_text(encoding="utf-8"))
    return value


def meta() -> dict[str, Any]:
    """What was prepared. Raises: DataError if it is missing."""
    value: dict[str, Any] = json.loads(_there(layout.META).read_text(encoding="utf-8"))
    return value


def _there(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"expected prepared data in {path}, found none; run `dvc repro prepare`")
    return path
