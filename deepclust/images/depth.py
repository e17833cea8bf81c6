"""Pixels of more than 8 bits, and which values of theirs are black and white.

A file's type says how many values a pixel may have, seldom how many it has: cameras and microscopes write 12 bits into
files of 16. So white is measured over a whole data set, once for each depth (`uint16`, `uint12`, `float32`, …), rounded
up to a power of two, and stored: brightness stays comparable between images, and a new image changes the scale only
where it needs a bit more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepclust.errors import DataError

Range = tuple[float, float]
"""The values that become black (0) and white (255)."""
White = float | Literal["auto", "file"]


class Raw(NamedTuple):
    """One decoded picture, upright, before it is brought to 8 bits.

    Attributes:
        values: (H, W) grey or (H, W, 3) RGB, integers or floats.
        depth: Name of its depth.
        stated: Black and white as the file's format states them.
        inverted: Whether its black is white, as in negatives.
    """

    values: NDArray[Any]
    depth: str
    stated: Range
    inverted: bool = False


class Measured(NamedTuple):
    """The values that one picture has.

    Attributes:
        depth: Name of its depth.
        low: Its least value.
        high: Its greatest value.
        stated: See `Raw`.
    """

    depth: str
    low: float
    high: float
    stated: Range


def raw(values: NDArray[Any], *, bits: int | None = None, inverted: bool = False) -> Raw:
    """A picture whose depth is its type's, or the `bits` that its file states: 12 bits in uint16 are `uint12`."""
    kind = values.dtype
    if kind.kind == "f":
        return Raw(values, kind.name, (0.0, 1.0), inverted)
    name = f"{'u' if kind.kind == 'u' else ''}int{bits}" if bits else kind.name
    size = bits or 8 * kind.itemsize
    low = 0 if kind.kind == "u" else -(2 ** (size - 1))
    return Raw(values, name, (float(low), float(low + 2**size - 1)), inverted)


def measure(found: Raw) -> Measured:
    """A picture's least and greatest value. Raises: DataError if one is not finite."""
    low, high = float(found.values.min()), float(found.values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError("it has values that are not finite; replace them")
    return Measured(found.depth, low, high, found.stated)


def settle(measured: Iterable[Measured], white: White) -> dict[str, Range]:
    """Black and white of each depth in a data set.

    Args:
        measured: Of all pictures with more than 8 bits.
        white: `file` takes what the files state; a number is white itself, and 0 black; `auto` takes the greatest value
            of all, rounded up to whole bits (610 → 1023; of floats, to a power of two), and where there are negative
            values the least, rounded likewise (-900 → -1024).
    """
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    stated: dict[str, Range] = {}
    for one in measured:
        lows[one.depth] = min(lows.get(one.depth, 0.0), one.low)
        highs[one.depth] = max(highs.get(one.depth, 0.0), one.high)
        stated[one.depth] = one.stated
    if white == "file":
        return stated
    if white != "auto":
        return dict.fromkeys(stated, (0.0, float(white)))
    return {name: (_whole_bits(lows[name], name), _whole_bits(highs[name], name)) for name in stated}


def _whole_bits(value: float, depth: str) -> float:
    """A bound of the values up to this one: 2ⁿ - 1 for whole numbers, 2ⁿ for fractions, -2ⁿ for negative ones."""
    if value < 0:
        return -(2.0 ** math.ceil(math.log2(-value)))
    if depth.startswith("float"):
        return 2.0 ** math.ceil(math.log2(value)) if value else 1.0
    return 2.0 ** max(1, int(value).bit_length()) - 1


def to_8_bits(found: Raw, ranges: Mapping[str, Range]) -> NDArray[np.uint8]:
    """Pixels from 0 to 255, rounded; what lies outside of black and white becomes black and white.

    Raises:
        DataError: If values are not finite, or `ranges` has no such depth: then no picture of the training images had
            it, and nobody knows its white.
    """
    if found.depth not in ranges:
        raise DataError(f"its pixels are {found.depth}, those of no training image; convert it to 8 bits")
    measure(found)
    black, white = ranges[found.depth]
    levels = np.rint((found.values.astype(np.float64) - black) * (255 / (white - black))).clip(0, 255).astype(np.uint8)
    return 255 - levels if found.inverted else levels
