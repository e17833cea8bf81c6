"""Reading what `prepare` wrote."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
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
    array: NDArray[np.uint8] = _array(split, "images", mmap_mode="r")
    return array


def labels(split: str) -> NDArray[np.int64]:
    """The labels of a split. Raises: DataError if they are missing."""
    array: NDArray[np.int64] = _array(split, "labels")
    return array


def heldout() -> NDArray[np.int64]:
    """Indices of the labelled training images that are held out. Raises: DataError if they are missing."""
    array: NDArray[np.int64] = _array("train", "heldout")
    return array


def load(split: str) -> Split:
    """A whole split. Raises: DataError if a file is missing."""
    with _path(split, "items.csv").open(encoding="utf-8", newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    return Split(images(split), labels(split), paths)


def statistics() -> dict[str, Any]:
    """Image size, channels, resize, mean and std. Raises: DataError if they are missing."""
    return _json(layout.STATISTICS)


def meta() -> dict[str, Any]:
    """What was prepared. Raises: DataError if it is missing."""
    return _json(layout.META)


def _path(split: str, name: str) -> Any:
    path = layout.split(split) / name
    if not path.exists():
        raise DataError(f"expected prepared data in {path}, found none; run `dvc repro prepare`")
    return path


def _array(split: str, name: str, mmap_mode: Any = None) -> Any:
    return np.load(_path(split, f"{name}.npy"), mmap_mode=mmap_mode, allow_pickle=False)


def _json(path: Any) -> dict[str, Any]:
    if not path.exists():
        raise DataError(f"expected prepared data in {path}, found none; run `dvc repro prepare`")
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
