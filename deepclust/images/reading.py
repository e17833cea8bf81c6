"""How images become pixels: settled once for a data set, and stored with it, so that new images are read alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from deepclust.config import Bands, Config, Natural, config
from deepclust.images import depth

Resize = Literal["crop", "pad", "stretch"]


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


def square(image: Image.Image, *, image_size: int, channels: int, resize: Resize) -> NDArray[np.uint8]:
    """Bring an image of mode L or RGB to (image_size, image_size, channels) uint8; see `read_image`."""
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # which would copy
    width, height = image.size
    if image.size != (image_size, image_size):
        # Pillow's bicubic widens with the reduction, so it does not alias.
        if resize == "crop":
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
        elif resize == "pad":
            # ImageOps.pad would round half an odd border to the nearest even number, and can lose a side of one pixel.
            scale = image_size / max(width, height)
            size = max(1, round(width * scale)), max(1, round(height * scale))
            whole = Image.new(image.mode, (image_size, image_size))
            corner = (image_size - size[0]) // 2, (image_size - size[1]) // 2
            whole.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
            image = whole
        else:
            image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).reshape(image_size, image_size, channels)
