"""One image file to pixels: any format, mode and size to an upright square of 8-bit grey or RGB."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from deepclust.errors import DataError
from deepclust.images import depth, formats
from deepclust.images.readers import deep, planes
from deepclust.images.reading import Reading, fitted, square

# Only these decoders: others run programs (EPS) or are seldom exercised, and a file's name says nothing of its content.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
_JPEG = ("JPEG", "MPO")  # further pictures in them are previews and maps of depth
_SMALL = 1 << 24  # bytes of a file that is held in memory
# A JPEG is decoded at a fraction of its size that leaves this many times the wanted side, to be reduced by Pillow. So
# photographs are at most .9 of 255 levels off on average at any side; with 1.5 times 1.2, and with the side alone 2.6.
_ENOUGH = 1.75
_LEAST = 16  # pixels that are left of a side; of fewer, the last one, which may hold less, would weigh too much
_DARK = 64  # mean luminance of what would hardly be seen on black

# Pillow warns of files that it still reads. One that it can not read is skipped with a reason, so no warning is needed.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Inspected(NamedTuple):
    """What is known of a file without its pixels.

    Attributes:
        sha256: Of the file's bytes, in hexadecimal: the image's id.
        width: In pixels.
        height: In pixels.
        measured: The values of its pixels if they have more than 8 bits, else None.
        depth: Name of its depth.
        has_pages: Whether it has several pages or frames.
    """

    sha256: str
    width: int
    height: int
    measured: depth.Measured | None
    depth: str = depth.EIGHT_BITS
    has_pages: bool = False


def inspect(path: Path, reading: Reading, *, max_pixels: int) -> Inspected:
    """Read what a data set's `Reading` is settled by; pixels are decoded only where they have more than 8 bits.

    Args:
        path: The file.
        reading: Its pages and bands count.
        max_pixels: See `read_images`.

    Raises:
        DataError: As `read_images`.
    """
    with _opened(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        picture = _picture(file, reading, max_pixels)
        if isinstance(picture, Image.Image):
            return Inspected(sha256, *picture.size, None, has_pages=_has_pages(picture))
        height, width = picture.values.shape[:2]
        measured = depth.measure(picture) if picture.is_deep else None
        return Inspected(sha256, width, height, measured, picture.depth, picture.pages > 1)


def read_image(path: Path, reading: Reading, *, image_size: int, channels: int, max_pixels: int) -> NDArray[np.uint8]:
    """Read one image file at one size, as (image_size, image_size, channels) uint8; see `read_images`."""
    return read_images(path, reading, image_sizes=[image_size], channels=channels, max_pixels=max_pixels)[0]


def read_images(
    path: Path, reading: Reading, *, image_sizes: Sequence[int], channels: int, max_pixels: int
) -> list[NDArray[np.uint8]]:
    """Read one image file at several sizes, of which none depends on the others.

    Other threads run while Pillow decodes and resizes.

    Args:
        path: The file.
        reading: How.
        image_sizes: Side of each result, in pixels.
        channels: 1 for grey, 3 for RGB.
        max_pixels: A file whose header says more is not decoded.

    Returns:
        (image_size, image_size, channels) uint8 for each size.

    Raises:
        DataError: If it can not be read; the message is the reason alone, without the path.
    """
    with _opened(path) as file:
        picture = _picture(file, reading, max_pixels)
        if isinstance(picture, Image.Image):
            if picture.format in _JPEG:
                again = (Image.open(file, formats=("JPEG",)) for _ in image_sizes[1:])
                pictures = itertools.chain([picture], again)
                return [_drafted(next(pictures), reading, side, channels) for side in image_sizes]
            _turn_upright(picture)
        image = _plain(picture, reading)
        how: Any = {"channels": channels, "resize": reading.resize}
        return [square(image, image_size=side, **how) for side in image_sizes]


def _drafted(image: Image.Image, reading: Reading, image_size: int, channels: int) -> NDArray[np.uint8]:
    """Decode a JPEG of which only the header is read, at half, a quarter or an eighth of its size if that will do."""
    how: Any = {"image_size": image_size, "resize": reading.resize}
    width, height = (max(_LEAST, math.ceil(_ENOUGH * side)) for side in fitted(*image.size, **how))
    # Its luminance is stored, and is the grey of its RGB, but where a colour was beyond RGB.
    draft = image.draft("L" if channels == 1 and not reading.bands else None, (width, height))
    # Of 1001 columns, an eighth is 125.125: the last of 126 is decoded whole, but only its part counts.
    pixels = square(_plain(image, reading), channels=channels, box=draft and draft[1], **how)
    orientation = 1
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return np.ascontiguousarray(planes.upright(pixels, orientation))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BytesIO | io.BufferedReader]:
    """A file to read an image from; whatever fails within the block is a DataError."""
    if not path.is_file():
        raise DataError("not a regular file")  # a pipe would be waited for
    try:
        with path.open("rb") as file:
            # From memory, Pillow reads small files in half the time, and photographs are read once for all sizes.
            yield io.BytesIO(file.read()) if os.fstat(file.fileno()).st_size < _SMALL else file
    except DataError:
        raise
    except Exception as error:  # decoders raise undocumented types on damaged files
        raise DataError(_reason(error)) from error


def _picture(file: BinaryIO, reading: Reading, max_pixels: int) -> Image.Image | depth.Raw:
    """What the reader of the file's format makes of it: an image of Pillow, of which only the header is read yet and
    which may not be upright, or decoded pixels."""
    file.seek(0)
    head = file.read(formats.HEAD)
    file.seek(0)
    pages: int | None = None
    openers: tuple[str, ...] = _FORMATS
    how: Any = {"pages": reading.pages, "bands": reading.bands, "max_pixels": max_pixels}
    format_ = formats.by_content(head)
    if format_ and format_.problem:
        raise DataError(format_.problem)
    Image.MAX_IMAGE_PIXELS = max_pixels  # for pictures inside of pictures, whose size only Pillow sees
    match format_ and format_.name:  # these readers' libraries take long to import
        case "TIFF":
            from deepclust.images.readers import tiff

            found = tiff.read(file, **how)
            if isinstance(found, depth.Raw):
                return found
            pages = found
            file.seek(0)
        case "DICOM":
            from deepclust.images.readers import dicom

            return dicom.read(file, **how)
        case "JPEG XL":
            from deepclust.images.readers import jpeg_xl

            return jpeg_xl.read(file, **how)
        case "HEIC":
            import pillow_heif

            pillow_heif.register_heif_opener()
            openers = ("HEIF",)
    image = Image.open(file, formats=openers)
    if image.width * image.height > max_pixels:
        raise DataError(f"{image.width} x {image.height} pixels, more than data.max_pixels ({max_pixels})")
    if picture := deep.read(file, image, pages=reading.pages, bands=reading.bands):
        return picture
    return image if reading.pages in ("first", 0) else _page(image, pages, reading)


def _page(image: Image.Image, count: int | None, reading: Reading) -> Image.Image:
    """The chosen page of a file, or what its pages make together."""
    if count is None:
        count = 1 if image.format in _JPEG else getattr(image, "n_frames", 1)
    numbers = planes.page_numbers(reading.pages, count)
    if len(numbers) == 1:
        image.seek(numbers[0])
        return image

    def frame(number: int) -> NDArray[np.uint8]:
        image.seek(number)
        single = image.copy()
        _turn_upright(single)
        return np.asarray(_plain(single, reading))

    return Image.fromarray(np.rint(planes.combined(map(frame, numbers), reading.pages)).astype(np.uint8))


def _has_pages(image: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # a damaged second frame is not read
        return image.format not in _JPEG and getattr(image, "is_animated", False)
    return False


def _turn_upright(image: Image.Image) -> None:
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)


def _plain(picture: Image.Image | depth.Raw, reading: Reading) -> Image.Image:
    """Any mode or depth to L or RGB."""
    if isinstance(picture, depth.Raw):
        image = Image.fromarray(np.ascontiguousarray(depth.to_8_bits(picture, reading.white)))
        if picture.alpha is None:
            return image
        image.putalpha(Image.fromarray(np.ascontiguousarray(picture.alpha)))
        return _opaque(image, reading.background)
    if picture.has_transparency_data:
        image = _opaque(picture, reading.background)
    elif picture.mode in ("L", "RGB"):
        image = picture
    else:
        image = picture.convert("L" if picture.mode == "1" else "RGB")
    return Image.fromarray(planes.chosen(np.asarray(image), reading.bands)) if reading.bands else image


def _opaque(image: Image.Image, background: Literal["auto", "black", "white"]) -> Image.Image:
    """An image with transparency on its background, as RGB."""
    over = image.convert("RGBA")
    if over.getchannel("A").getextrema() == (255, 255):
        return over.convert("RGB")
    if background == "auto":
        alpha = np.asarray(over.getchannel("A"), np.float64)
        light = (np.asarray(over.convert("L")) * alpha).sum() / max(alpha.sum(), 1)
        background = "white" if light < _DARK and alpha.any() else "black"
    return Image.alpha_composite(Image.new("RGBA", over.size, background), over).convert("RGB")


def _reason(error: Exception) -> str:
    """The reason in one line, without a path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than data.max_pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"can not be decoded: {' '.join(str(error).split())[:200] or type(error).__name__}"
