"""How images become pixels: settled once for a data set, and stored with it, so that new images are read alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepclust.config import Bands, Config, Natural, config
from deepclust.images import depth

Resize = Literal["crop", "pad", "stretch"]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels, which need not be whole."""
# Of an image at least six times as large, whole blocks of pixels are averaged first, which leaves this many times the
# size. It costs photographs .4 of 255 levels on average, and takes a fraction of the time.
_REDUCING_GAP = 3.0


@config
class Reading(Config):
    """How files become pixels, apart from size and channels."""

    resize: Resize = "crop"
    """crop: shorter side to image_size, then the centre; pad: the whole image on black; stretch."""
    background: Literal["auto", "black", "white"] = "auto"
    """What shows through transparent pixels; auto: black, or white behind a dark drawing."""
    pages: Literal["first", "middle", "max", "mean"] | Natural = "first"
    """Of a file with several pages: one of them, a number from 0, or the maximum or mean of all."""
    bands: Bands = ()
    """Of a file with many bands: one (grey) or three (RGB), numbers from 0; none: the first three, or the first."""
    white: Mapping[str, depth.Range] = field(default_factory=dict)
    """Black and white of each depth above 8 bits; see `depth`."""

    @classmethod
    def of(cls, statistics: Mapping[str, Any]) -> Reading:
        """The part of a description of images that is a reading. Raises: ConfigError."""
        return cls(**{own.name: statistics[own.name] for own in fields(cls) if own.name in statistics})


def fitted(width: float, height: float, *, image_size: int, resize: Resize) -> tuple[int, int]:
    """Width and height of the image within the square: its side, but for the shorter side of `pad`; at least 1."""
    if resize != "pad":
        return image_size, image_size
    scale = image_size / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def square(
    image: Image.Image, *, image_size: int, channels: int, resize: Resize, box: Box | None = None
) -> NDArray[np.uint8]:
    """Bring an image of mode L or RGB to (image_size, image_size, channels) uint8; see `decode.read_images`.

    Args:
        image: Any size.
        image_size: Side of the result, in pixels.
        channels: 1 for grey, 3 for RGB.
        resize: See `Reading`.
        box: The part that is the image; None: all of it.
    """
    left, top, right, bottom = box or (0, 0, *image.size)
    if resize == "crop":
        side = min(right - left, bottom - top)
        left, top = (left + right - side) / 2, (top + bottom - side) / 2
        right, bottom = left + side, top + side
    if channels == 1 and image.mode != "L":
        image = image.convert("L")
    size = fitted(right - left, bottom - top, image_size=image_size, resize=resize)
    if size != image.size or (left, top, right, bottom) != (0, 0, *size):  # else resize would copy
        # Pillow's bicubic widens with the reduction, so it does not alias.
        gap = _REDUCING_GAP if min(size) >= 8 else None  # of fewer blocks, the last, which may be cut, weighs too much
        image = image.resize(size, Image.Resampling.BICUBIC, (left, top, right, bottom), gap)
    if channels == 3 and image.mode != "RGB":  # only now, since three equal channels take three times as long
        image = image.convert("RGB")
    if size != (image_size, image_size):
        # ImageOps.pad would round half an odd border to the nearest even number, and can lose a side of one pixel.
        whole = Image.new(image.mode, (image_size, image_size))
        whole.paste(image, ((image_size - size[0]) // 2, (image_size - size[1]) // 2))
        image = whole
    return np.asarray(image, dtype=np.uint8).reshape(image_size, image_size, channels)
