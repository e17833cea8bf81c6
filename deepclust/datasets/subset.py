"""Some images of a source, drawn by their names, so that another image more or less changes at most one of them."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepclust.images.decode import Inspected
from deepclust.images.reading import Reading
from deepclust.images.source import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subset(Source):
    """Images of another source, in its order.

    Attributes:
        whole: The source.
        numbers: Numbers there of these images.
    """

    whole: Source
    numbers: NDArray[np.int64]

    def inspect(self, index: int, reading: Reading) -> Inspected:
        """See `Source.inspect`."""
        return self.whole.inspect(int(self.numbers[index]), reading)

    def read(
        self, index: int, reading: Reading, *, image_sizes: Sequence[int], channels: int
    ) -> list[NDArray[np.uint8]]:
        """See `Source.read`."""
        return self.whole.read(int(self.numbers[index]), reading, image_sizes=image_sizes, channels=channels)


def drawn(source: Source, count: int, *, seed: int) -> Source:
    """At most so many images of a source; the whole source where it has no more.

    The images are those whose names have the smallest hashes with the seed. What the source has skipped is drawn among
    them, so that its share stays what it was. What is drawn is not published.

    Args:
        source: The images.
        count: How many to draw.
        seed: Draws.
    """
    names = [*source.paths, *(item["path"] for item in source.skipped)]
    if count >= len(names):
        return source

    def key(index: int) -> tuple[bytes, int]:
        return hashlib.sha256(f"{seed}/subset/{names[index]}".encode("utf-8", "surrogateescape")).digest(), index

    readable = len(source.paths)
    found = np.array(sorted(heapq.nsmallest(count, range(len(names)), key=key)), np.int64)
    numbers = found[found < readable]
    chosen: dict[str, Any] = {
        field.name: getattr(source, field.name) for field in dataclasses.fields(Source) if field.name != "published"
    }
    chosen["paths"] = [source.paths[number] for number in numbers.tolist()]
    chosen["labels"] = source.labels[numbers]
    chosen["skipped"] = [source.skipped[number - readable] for number in found[found >= readable].tolist()]
    if source.sides is not None:
        chosen["sides"] = [source.sides[number] for number in numbers.tolist()]
    return Subset(**chosen, whole=source, numbers=numbers)
