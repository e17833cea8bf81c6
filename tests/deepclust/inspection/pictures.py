"""Pictures with structure on every scale, so that each is like no other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def textures(count: int, side: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """(count, side, side, channels): noise of 3, 6, 12 and 24 pixels a side, enlarged and added."""
    random = np.random.default_rng(seed)
    found = np.empty((count, side, side, channels), np.uint8)
    for picture in found:
        total = np.full((side, side, channels), 128.0)
        for cells, strength in ((3, 30), (6, 25), (12, 20), (24, 15)):
            noise = random.normal(128, strength, (cells, cells, channels)).clip(0, 255).astype(np.uint8)
            total += resized(noise, side).astype(float) - 128
        picture[:] = total.clip(0, 255)
    return found


def resized(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A picture (H, W, C) at another size, by Pillow."""
    bands = [
        Image.fromarray(band).resize((side, side), Image.Resampling.BICUBIC) for band in picture.transpose(2, 0, 1)
    ]
    return np.stack([np.asarray(band) for band in bands], 2)
