"""Images as luminance, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's mode L
_VALUES_AT_ONCE = 1 << 21


def blocks(images: NDArray[np.uint8]) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """Consecutive images (n, H, W, C) and their places; of a memory map, one block at a time is read."""
    size = max(1, _VALUES_AT_ONCE // max(1, int(np.prod(images.shape[1:]))))
    for start in range(0, len(images), size):
        rows = slice(start, min(start + size, len(images)))
        yield rows, images[rows]


def luminance(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images (n, H, W, C) as grey (n, H, W) float32 from 0 to 255."""
    levels = images.astype(np.float32)
    return levels[..., 0] if images.shape[-1] == 1 else levels @ _LUMINANCE
