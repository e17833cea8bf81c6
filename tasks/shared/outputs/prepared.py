"""Reading what `prepare` and `embed` wrote: arrays and tables of one split have a row for each of its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deepclust.config import Hash, Natural, Positive, Share, Side
from deepclust.errors import DataError
from tasks.shared.outputs import layout, read

_STATISTICS = {
    "image_size": Side,
    "channels": Literal[1, 3],
    "mean": list[Share],
    "std": list[Positive],
    "held": Side,
    "images": dict[Literal["train", "test"], Hash],
}
_COUNTS = dict[Literal["images", "labelled"], Natural]
_REASONS = list[dict[Literal["path", "reason"], str]]
_META = {
    "source": str,
    "classes": list[str],
    "content_hash": str,
    "train": _COUNTS,
    "test": _COUNTS,
    "skipped": _REASONS,
    "ignored": Natural,
    "left_out": _REASONS,
    "warnings": list[str],
}


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


def images(split: str, encoder: str) -> NDArray[np.uint8]:
    """The images of a split that an encoder gets, memory-mapped. Raises: DataError if they are missing or damaged."""
    described = statistics(encoder)
    side = described["image_size"]
    path = layout.images(side) / f"{split}.npy"
    found = read.array(path, (count(split), side, side, described["channels"]), np.uint8)
    if not len(found):
        raise read.damaged(path, f"expected images in {path}, got none")
    return found


def count(split: str) -> int:
    """Number of images of a split. Raises: DataError if it is not known."""
    number: int = meta()[split]["images"]
    return number


def labels(split: str) -> NDArray[np.int64]:
    """The labels of a split. Raises: DataError if they are missing or damaged."""
    path = layout.split(split) / "labels.npy"
    found: NDArray[np.int64] = np.array(read.array(path, (count(split),), np.int64))
    classes = len(meta()["classes"])
    if len(found) and not (found.min() >= -1 and found.max() < classes):
        raise read.damaged(
            path, f"expected labels from -1 to {classes - 1} in {path}, got {found.min()} to {found.max()}"
        )
    return found


def heldout() -> NDArray[np.int64]:
    """Indices of the labelled training images that are held out. Raises: DataError if they are missing or damaged."""
    path = layout.split("train") / "heldout.npy"
    found: NDArray[np.int64] = np.array(read.array(path, (None,), np.int64))
    labelled = np.flatnonzero(labels("train") >= 0)
    if not np.array_equal(found, np.intersect1d(found, labelled)):
        raise read.damaged(path, f"expected sorted indices of labelled training images in {path}, got others")
    return found


def load(split: str, encoder: str) -> Split:
    """A whole split, with the images that an encoder gets. Raises: DataError if a file is missing or damaged."""
    path = layout.split(split) / "items.csv"
    rows = read.table(path, {"index": int, "path": str, "label": str})
    pixels, numbers = images(split, encoder), labels(split)
    if [int(row["index"]) for row in rows] != list(range(len(pixels))):
        raise read.damaged(path, f"expected {len(pixels)} numbered rows in {path}, as in labels.npy, got {len(rows)}")
    return Split(pixels, numbers, [row["path"] for row in rows])


def embeddings(encoder: str) -> dict[str, NDArray[np.float32]]:
    """Features (N, D) of each split, memory-mapped, to be written to in memory only, as torch wants it.

    Raises:
        DataError: If they are missing or damaged, or not finite.
    """
    found: dict[str, NDArray[np.float32]] = {}
    dim = None
    for split in layout.SPLITS:
        shape = (count(split), dim)
        found[split] = read.array(layout.embeddings(encoder, split), shape, np.float32, finite=True, mode="c")
        dim = found[split].shape[1]
    return found


def statistics(encoder: str) -> dict[str, Any]:
    """Of the images that an encoder gets: side, channels, how files became pixels, mean and std, and the side that the
    data set holds. Raises: DataError if they are missing or damaged."""
    path = layout.statistics(encoder)
    if not path.exists() and layout.META.exists():
        raise DataError(
            f"expected a description of the images of {encoder} in {path}, found none; name {encoder} in `encoders`, "
            "and run `dvc repro prepare`"
        )
    return read.record(path, _STATISTICS)


def meta() -> dict[str, Any]:
    """What was prepared. Raises: DataError if it is missing or damaged."""
    return read.record(layout.META, _META)
