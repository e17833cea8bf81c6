"""JPEG XL (ISO/IEC 18181), which imagecodecs decodes upright; what it does not tell is read from the header first."""

from __future__ import annotations

from typing import BinaryIO, NamedTuple

import imagecodecs
import numpy as np

from deepclust.errors import DataError
from deepclust.images import depth
from deepclust.images.readers import planes

_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}  # width to height
_SIZES = ((9, 1), (13, 1), (18, 1), (30, 1))
# How far an entry of these tables goes: so many bits of an offset, added to the value.
_BITS = ((0, 8), (0, 10), (0, 12), (6, 1))
_FLOAT_BITS = ((0, 32), (0, 16), (0, 24), (6, 1))
_TICKS = (
    ((0, 100), (0, 1000), (10, 1), (30, 1)),
    ((0, 1), (0, 1001), (8, 1), (10, 1)),
    ((0, 0), (3, 0), (16, 0), (32, 0)),
)


class Header(NamedTuple):
    """What a file says of its picture.

    Attributes:
        width: In pixels, as stored.
        height: Likewise.
        bits: Of a value.
        is_animated: Whether it has several frames.
    """

    width: int
    height: int
    bits: int
    is_animated: bool


def read(file: BinaryIO, *, pages: str | int, bands: tuple[int, ...], max_pixels: int) -> depth.Raw:
    """Decode a picture, or one frame of an animation.

    Args:
        file: At its start.
        pages: first, or a number from 0; a file that is no animation has one.
        bands: See `planes.band_numbers`.
        max_pixels: A file whose header says more is not decoded.

    Raises:
        DataError: If it has more pixels, no such page or band, or is an animation of which all frames are asked for.
    """
    content = file.read()
    found = header(content)
    if found.width * found.height > max_pixels:
        raise DataError(f"{found.width} x {found.height} pixels, more than data.max_pixels ({max_pixels})")
    number = 0
    if not found.is_animated:
        planes.page_numbers(pages, 1)
    elif isinstance(pages, int):
        number = pages
    elif pages != "first":
        raise DataError(f"an animation in JPEG XL, of which data.pages can not be {pages}; save it as a TIFF")
    values = imagecodecs.jpegxl_decode(content, index=number, numthreads=1)
    alpha = None
    if values.shape[2:] in ((2,), (4,)):
        opaque = 1.0 if values.dtype.kind == "f" else 2.0**found.bits - 1
        alpha = np.rint(values[..., -1] * (255 / opaque)).clip(0, 255).astype(np.uint8)
        values = values[..., :-1]
    return depth.raw(planes.chosen(values, bands), bits=found.bits)._replace(alpha=alpha)


def header(content: bytes) -> Header:
    """Read a file's header. Raises: DataError if it has none."""
    bits = _Bits(_codestream(content))
    width, height = _size(bits)
    default = bits.take(1)
    is_animated = False
    if not default and bits.take(1):
        bits.take(3)  # the orientation, which the decoder applies
        if bits.take(1):
            _size(bits)  # as it is meant to be seen
        if bits.take(1):
            raise DataError("JPEG XL with a preview; convert it to PNG")
        if is_animated := bool(bits.take(1)):
            for table in _TICKS:
                bits.choice(table)
            bits.take(1)
    if default:
        return Header(width, height, 8, is_animated)
    return Header(width, height, bits.choice(_FLOAT_BITS if bits.take(1) else _BITS), is_animated)


def _size(bits: _Bits) -> tuple[int, int]:
    eighths = bits.take(1)

    def length() -> int:
        return 8 * (1 + bits.take(5)) if eighths else bits.choice(_SIZES)

    height = length()
    ratio = bits.take(3)
    if not ratio:
        return length(), height
    over, under = _RATIOS[ratio]
    return height * over // under, height


def _codestream(content: bytes) -> bytes:
    """The first bytes of the codestream, which may lie in a box (jxlc), or in parts (jxlp, with a number each)."""
    at = 0
    while content[at : at + 2] != b"\xff\x0a":
        size, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        start = 16 if size == 1 else 8
        size = int.from_bytes(content[at + 8 : at + 16], "big") if size == 1 else size
        if kind in (b"jxlc", b"jxlp"):
            at += start + (4 if kind == b"jxlp" else 0)
        elif size < start or at + size >= len(content):
            raise DataError("JPEG XL without a picture")
        else:
            at += size
    return content[at + 2 : at + 64]


class _Bits:
    """Numbers of any length in bytes, the lowest bit first."""

    def __init__(self, content: bytes) -> None:
        self._rest = int.from_bytes(content, "little")

    def take(self, count: int) -> int:
        value = self._rest & ((1 << count) - 1)
        self._rest >>= count
        return value

    def choice(self, table: tuple[tuple[int, int], ...]) -> int:
        """A number of which two bits say how it is written: (length, least value)."""
        length, least = table[self.take(2)]
        return least + self.take(length)
