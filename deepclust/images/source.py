"""What a data set is before it is prepared: a list of images with their labels, which are read one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deepclust.images import decode
from deepclust.images.reading import Reading


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """N images by their number, none of them read yet.

    Attributes:
        name: As in params.yaml.
        classes: Names of the labels.
        paths: N names of the images, each once; training and test images keep their order.
        labels: (N,) int64, -1 unknown.
        sides: `train` or `test` for each image, or None if the data set states no sides, so that they are drawn.
        published: Whether numbers on these sides are compared with published ones, so that no image may be left out.
        image_size: Side of its images in pixels, where all have the same and it is to be kept; None: see `inspect`.
        channels: 1 or 3 where it is known before the images are read, else None.
        warnings: What the user should know of it.
        skipped: `path` and `reason` of what should have been an image and is left out.
        ignored: Number of files that are no images.
    """

    name: str
    classes: list[str]
    paths: list[str]
    labels: NDArray[np.int64]
    sides: list[str] | None
    published: bool = False
    image_size: int | None = None
    channels: int | None = None
    warnings: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    ignored: int = 0

    @abstractmethod
    def inspect(self, index: int, reading: Reading) -> decode.Inspected:
        """An image's id, its size, and its values if they have more than 8 bits.

        Equal ids mean equal pixels. Several threads call this, and `read`, at once.

        Raises:
            DataError: If it can not be read; the message is the reason alone.
        """

    @abstractmethod
    def read(
        self, index: int, reading: Reading, *, image_sizes: Sequence[int], channels: int
    ) -> list[NDArray[np.uint8]]:
        """An image as (image_size, image_size, channels) uint8 for each size, which does not depend on the others.

        Raises:
            DataError: As `inspect`.
        """
