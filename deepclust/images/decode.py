"""One image file to pixels: any mode and size to a square of 8-bit grey or RGB.

Transparent pixels become black, as the border of `pad` does. 16-bit grey is scaled as a whole (65535 is white), so that
brightness stays comparable between images. EXIF rotation is applied. Of an animation the first picture is taken.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from deepclust.errors import DataError

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm")
)
# Only these decoders: others run programs (EPS) or are seldom exercised, and a file's name says nothing of its content.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
Resize = Literal["crop", "pad", "stretch"]

# Pillow warns of files that it still reads. One that it can not read is skipped with a reason, so no warning is needed.
warnings.filterwarnings("ignore", module=r"PIL\.")


def is_image(name: str) -> bool:
    """Whether a file's name ends like an image's."""
    return Path(name).suffix.lower() in EXTENSIONS


def read_image(path: Path, *, image_size: int, channels: int, resize: Resize, max_pixels: int) -> NDArray[np.uint8]:
    """Read one image file.

    Args:
        path: The file.
        image_size: Side of the result, in pixels.
        channels: 1 for grey, 3 for RGB.
        resize: `crop` (shorter side to image_size, then the centre), `pad` (the whole image on black) or `stretch`.
        max_pixels: A file whose header says more is not decoded.

    Returns:
        (image_size, image_size, channels) uint8.

    Raises:
        DataError: If it can not be read; the message is the reason alone, without the path.
    """
    with _opened(path, max_pixels) as image:
        image.draft(None, (2 * image_size, 2 * image_size))  # JPEG: decodes large photographs several times faster
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return square(_plain(image), image_size=image_size, channels=channels, resize=resize)


def shorter_side(path: Path, *, max_pixels: int) -> int:
    """Shorter side in pixels, from the header. Raises: DataError as `read_image`."""
    with _opened(path, max_pixels) as image:
        return min(image.size)


def square(image: Image.Image, *, image_size: int, channels: int, resize: Resize) -> NDArray[np.uint8]:
    """Bring an image of mode L or RGB to (image_size, image_size, channels) uint8; see `read_image`."""
    image = image.convert("L" if channels == 1 else "RGB")
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


@contextlib.contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """A file's image, of which only the header is read; what fails within the block is a DataError too."""
    if not path.is_file():
        raise DataError("not a regular file")  # a pipe would be waited for
    Image.MAX_IMAGE_PIXELS = max_pixels  # for pictures inside of pictures, whose size only Pillow sees
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise DataError(f"{image.width} x {image.height} pixels, more than data.max_pixels ({max_pixels})")
            yield image
    except DataError:
        raise
    except Exception as error:  # decoders raise undocumented types on damaged files
        raise DataError(_reason(error)) from error


def _plain(image: Image.Image) -> Image.Image:
    """Any mode to L or RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep(image)
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits: integers from 0 to 65535 or floats from 0 to 1."""
    white = 1.0 if image.mode == "F" else 65535.0
    values = np.asarray(image, dtype=np.float64)
    if not (values.min() >= 0 and values.max() <= white):  # written so that NaN fails too
        raise DataError(f"grey values outside 0 to {white:g}; scale them")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _reason(error: Exception) -> str:
    """The reason in one line, without a path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than data.max_pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split())[:200] or type(error).__name__
