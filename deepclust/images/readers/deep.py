"""PNG, PNM and JPEG 2000 of more than 8 bits, all of which Pillow would cut to 8, or scale, where there is colour."""

from __future__ import annotations

import contextlib
import re
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from deepclust.errors import DataError
from deepclust.images import depth
from deepclust.images.readers import planes

_PNM = re.compile(rb"P([2356])" + 3 * rb"(?:\s|#[^\r\n]*[\r\n])+(\d+)" + rb"\s")
_JPEG2000 = b"\xff\x4f\xff\x51"  # where the codestream begins, with the markers SOC and SIZ
_COLOURS = re.compile(rb"colr\x01..(....)", re.DOTALL)
_RGB_OR_GREY = (16, 17)


def read(file: BinaryIO, image: Image.Image, *, pages: str | int, bands: tuple[int, ...]) -> depth.Raw | None:
    """Decode a file, or leave it to Pillow, which does well with 8 bits.

    Args:
        file: Its position stays as it is.
        image: What Pillow made of its header.
        pages: See `planes.page_numbers`; there is one.
        bands: See `planes.band_numbers`.

    Returns:
        The picture, upright, or None.

    Raises:
        DataError: If it is of a kind that is not read, or has no such page or band.
    """
    position = file.tell()
    reader = {"PNG": _png, "PPM": _pnm, "JPEG2000": _jpeg_2000}.get(image.format or "")
    found = reader(file, image) if reader else None
    file.seek(position)
    if found is None and (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        found = depth.raw(np.asarray(image))
    if found is None:
        return None
    planes.page_numbers(pages, 1)
    return found._replace(values=planes.chosen(found.values, bands))


def _png(file: BinaryIO, image: Image.Image) -> depth.Raw | None:
    file.seek(0)
    content = file.read(25)
    if content[24] != 16:
        return None
    if getattr(image, "is_animated", False):
        raise DataError("an animated PNG of 16 bits; convert it to 8 bits")
    import imagecodecs  # which a registered model does without

    content += file.read()
    values: NDArray[Any] = imagecodecs.png_decode(content)
    alpha = None
    if values.shape[2:] in ((2,), (4,)):
        alpha = np.rint(values[..., -1] / np.float32(257)).astype(np.uint8)
        values = values[..., :-1]
    orientation = 1
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
        # PNG's own method decodes all pixels, as EXIF may come after them.
        exif = image.getexif() if b"eXIf" in content else Image.Image.getexif(image)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    turned = None if alpha is None else planes.upright(alpha, orientation)
    return depth.raw(planes.upright(values, orientation))._replace(alpha=turned)


def _pnm(file: BinaryIO, image: Image.Image) -> depth.Raw | None:
    file.seek(0)
    content = file.read()
    header = _PNM.match(content)
    if header is None or (most := int(header[4])) <= 255:
        return None
    kind, body = int(header[1]), content[header.end() :]
    shape = (image.height, image.width, 3) if kind in (3, 6) else (image.height, image.width)
    count = int(np.prod(shape))
    values: NDArray[Any]
    if kind in (2, 3):
        text = re.sub(rb"#[^\r\n]*", b"", body).decode("ascii")
        values = np.fromstring(text, np.int64, sep=" ")[:count]
    else:
        values = np.frombuffer(body[: min(len(body) // 2, count) * 2], ">u2")
    if len(values) < count:
        raise DataError(f"cut off: {len(values)} of {count} values")
    if values.min() < 0 or values.max() > most:
        raise DataError(f"values up to {values.max()}, more than the {most} that it states")
    values = values.astype(np.uint16).reshape(shape)
    if most & (most + 1):  # no power of two less one
        return depth.Raw(values, f"maxval{most}", (0.0, float(most)))
    return depth.raw(values, bits=most.bit_length())


def _jpeg_2000(file: BinaryIO, image: Image.Image) -> depth.Raw | None:
    file.seek(0)
    content = file.read()
    start = content.index(_JPEG2000)
    bits = (content[start + 42] & 0x7F) + 1  # of the first component; the top bit says whether it is signed
    # A further band may be infrared as well as transparency, so it is none.
    if bits <= 8 and image.mode not in ("LA", "RGBA"):
        return None
    for colours in _COLOURS.findall(content[:start]):
        if int.from_bytes(colours, "big") not in _RGB_OR_GREY:
            raise DataError("JPEG 2000 in other colours than RGB; convert it to TIFF")
    import imagecodecs

    return depth.raw(imagecodecs.jpeg2k_decode(content, numthreads=1), bits=bits)
