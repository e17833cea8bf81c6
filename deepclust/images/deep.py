"""PNG, PNM and JPEG 2000 of more than 8 bits, all of which Pillow would cut to 8, or scale, where there is colour."""

from __future__ import annotations

import contextlib
import re
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from deepclust.errors import DataError
from deepclust.images import depth, planes

_PNM = re.compile(rb"P([2356])" + 3 * rb"(?:\s|#[^\r\n]*[\r\n])+(\d+)" + rb"\s")
_JPEG2000 = b"\xff\x4f\xff\x51"  # where the codestream begins, with the markers SOC and SIZ
_COLOURS = re.compile(rb"colr\x01..(....)", re.DOTALL)
_RGB_OR_GREY = (16, 17)


def read(file: BufferedReader, image: Image.Image, bands: tuple[int, ...]) -> depth.Raw | None:
    """Decode a file, or leave it to Pillow, which does well with 8 bits.

    Args:
        file: Its position stays as it is.
        image: What Pillow made of its header.
        bands: See `planes.band_numbers`.

    Returns:
        The picture, upright, or None.

    Raises:
        DataError: If it is of a kind that is not read, or has no such band.
    """
    reader = {"PNG": _png, "PPM": _pnm, "JPEG2000": _jpeg_2000}.get(image.format or "")
    if reader is None:
        return None
    position = file.tell()
    file.seek(0)
    found = reader(file, image)
    file.seek(position)
    return found._replace(values=planes.chosen(found.values, bands)) if found else None


def _png(file: BufferedReader, image: Image.Image) -> depth.Raw | None:
    if file.read(25)[24] != 16:
        return None
    if getattr(image, "is_animated", False):
        raise DataError("an animated PNG of 16 bits; convert it to 8 bits")
    import imagecodecs  # which a registered model does without

    file.seek(0)
    content = file.read()
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


def _pnm(file: BufferedReader, image: Image.Image) -> depth.Raw | None:
    content = file.read()
    header = _PNM.match(content)
    if header is None or (most := int(header[4])) <= 255:
        return None
    kind, body = int(header[1]), content[header.end() :]
    shape = (image.height, image.width, 3) if kind in (3, 6) else (image.height, image.width)
    count = int(np.prod(shape))
    values: NDArray[Any]
    if kind in (2, 3):
        values = np.fromstring(re.sub(rb"#[^\r\n]*", b"", body).decode("ascii"), np.int64, count, sep=" ").astype(
            np.uint16
        )
    else:
        values = np.frombuffer(body[: 2 * count], ">u2").astype(np.uint16)
    if len(values) < count:
        raise DataError(f"cut off: {len(values)} of {count} values")
    values = values.reshape(shape)
    if most & (most + 1):  # no power of two less one
        return depth.Raw(values, f"maxval{most}", (0.0, float(most)))
    return depth.raw(values, bits=most.bit_length())


def _jpeg_2000(file: BufferedReader, image: Image.Image) -> depth.Raw | None:
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
