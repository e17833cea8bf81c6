"""The shifted test images of the stage `adapt`, and the orders in which a stream meets them.

A shift is a corruption at a severity, a domain, or `clean`. A setting says how shifts and classes follow one another:

reset       one stream a shift, each begun afresh, images in random order
continual   the shifts one after the other in one stream
mixed       the images of all shifts in random order in one stream
correlated  one stream a shift, begun afresh, sorted by class
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust import seeding
from deepclust.corruptions import corrupt
from deepclust.models.features import to_float

SETTINGS = ("reset", "continual", "mixed", "correlated")
CLEAN = ("clean", 0)
_CHUNK = 256  # images corrupted at once


@dataclass(frozen=True)
class Shift:
    """Test images of one kind.

    Attributes:
        name: Of the corruption or domain.
        severity: 1 to 5; 0 where there is none.
        images: (N, H, W, C) uint8, possibly memory-mapped, in random order.
        labels: (N,) int64, -1 where unknown.
        paths: N paths relative to the source.
    """

    name: str
    severity: int
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    paths: list[str]

    @property
    def title(self) -> str:
        """As printed."""
        return f"{self.name} {self.severity}" if self.severity else self.name


class Stream(NamedTuple):
    """Images in the order in which an adapter meets them, which starts afresh.

    Attributes:
        shift: (M,) index of each image's shift.
        image: (M,) its row there.
        batches: Slices of the two.
    """

    shift: NDArray[np.int64]
    image: NDArray[np.int64]
    batches: list[slice]


def choose(labels: NDArray[np.int64], *, count: int, seed: int) -> NDArray[np.int64]:
    """Rows of at most `count` images, a seeded choice in a seeded order; labelled ones if there are any."""
    labelled = np.flatnonzero(labels >= 0)
    rows = labelled if len(labelled) else np.arange(len(labels))
    order = torch.randperm(len(rows), generator=seeding.generator("adapt", seed)).numpy()
    chosen: NDArray[np.int64] = rows[order[:count]]
    return chosen


def corrupted(clean: Shift, corruption: str, severity: int, *, seed: int, file: Path) -> Shift:
    """The same images under a corruption, rounded to 8 bits as in the benchmark, kept in a file.

    All severities of a corruption share their random numbers, so that they differ in strength alone.
    """
    generator = seeding.generator("adapt", seed, corruption)

    def changed() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(clean.images), _CHUNK):
            plain = to_float(torch.from_numpy(clean.images[start : start + _CHUNK]))
            found = corrupt(plain, corruption, severity, generator=generator)
            yield (found * 255).round().byte().permute(0, 2, 3, 1).numpy()

    images = keep(changed(), clean.images.shape[1:], file)
    return Shift(corruption, severity, images, clean.labels, clean.paths)


def keep(chunks: Iterable[NDArray[np.uint8]], shape: tuple[int, ...], file: Path) -> NDArray[np.uint8]:
    """Write images into a file of bare bytes, and map it to read.

    Not through a memory map: that is a file with holes, and where the disk is full the process dies of the first write
    into one, in place of an OSError. Images come in chunks (n, H, W, C), and `shape` is (H, W, C).
    """
    count = 0
    with file.open("wb") as out:
        for chunk in chunks:
            out.write(chunk.tobytes())
            count += len(chunk)
    images: NDArray[np.uint8] = np.memmap(file, np.uint8, mode="r", shape=(count, *shape))
    return images


def cuts(count: int, batch_size: int) -> list[slice]:
    """Batches of a stream; a single image left over goes into the batch before it, where statistics can be taken."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and batch_size > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts, count][1:], strict=True)]


def streams(shifts: Sequence[Shift], setting: str, *, batch_size: int, seed: int) -> list[Stream]:
    """The streams of one of `SETTINGS`. Sorted by class, a shift without labels has none. The seed is for `mixed`."""
    if setting == "continual":
        return [_stream(_pairs(enumerate(shifts)), batch_size)]
    if setting == "mixed":
        pairs = _pairs(enumerate(shifts))
        order = torch.randperm(len(pairs), generator=seeding.generator("adapt", seed, "mixed")).numpy()
        return [_stream(pairs[order], batch_size)]
    if setting == "correlated":
        shifts_and_orders = [
            (index, np.argsort(shift.labels, kind="stable"))
            for index, shift in enumerate(shifts)
            if (shift.labels >= 0).all()
        ]
        return [_stream(_pairs([(index, shifts[index])])[order], batch_size) for index, order in shifts_and_orders]
    return [_stream(_pairs([(index, shift)]), batch_size) for index, shift in enumerate(shifts)]


def load(shifts: Sequence[Shift], stream: Stream, batch: slice) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of a batch."""
    rows = zip(stream.shift[batch].tolist(), stream.image[batch].tolist(), strict=True)
    return to_float(torch.from_numpy(np.stack([shifts[shift].images[image] for shift, image in rows])))


def _pairs(shifts: Iterable[tuple[int, Shift]]) -> NDArray[np.int64]:
    """(M, 2): shift and row of every image."""
    return np.concatenate(
        [np.stack([np.full(len(shift.images), index), np.arange(len(shift.images))], axis=1) for index, shift in shifts]
    )


def _stream(pairs: NDArray[np.int64], batch_size: int) -> Stream:
    return Stream(pairs[:, 0], pairs[:, 1], cuts(len(pairs), batch_size))
