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
EIGHT_BITS = "8 bits"
"""The depth of what has no more than 256 values, which are black and white as stated."""
_FEW = 16  # grey levels
_LARGEST = 1e30  # what is beyond it marks pixels without a value


class Raw(NamedTuple):
    """One decoded picture, upright, before it is brought to 8 bits.

    Attributes:
        values: (H, W) grey or (H, W, 3) RGB, integers or floats.
        depth: Name of its depth; `EIGHT_BITS` for fewer too.
        stated: Black and white as the file's format states them.
        inverted: Whether its black is white, as in negatives.
        alpha: (H, W) uint8, 255 opaque, if it has transparency.
        pages: Of its file.
    """

    values: NDArray[Any]
    depth: str
    stated: Range
    inverted: bool = False
    alpha: NDArray[np.uint8] | None = None
    pages: int = 1

    @property
    def is_deep(self) -> bool:
        """Whether it has more than 256 values; others are black and white as stated."""
        return self.depth.startswith("float") or self.stated[1] - self.stated[0] > 255


class Measured(NamedTuple):
    """The values that one picture has.

    Attributes:
        depth: Name of its depth.
        low: Its least value, at most 0.
        high: Its greatest value, at least 0.
        stated: See `Raw`.
    """

    depth: str
    low: float
    high: float
    stated: Range


def raw(
    values: NDArray[Any], *, kind: np.dtype[Any] | None = None, bits: int | None = None, inverted: bool = False
) -> Raw:
    """A picture whose depth is its type's, or the `bits` that its file states: 12 bits in uint16 are `uint12`.

    Args:
        values: See `Raw`.
        kind: The file's type, where the values are no longer of it, such as means.
        bits: Of whole numbers, if the file states fewer than the type has.
        inverted: See `Raw`.
    """
    kind = kind or values.dtype
    if kind.kind == "f":
        return Raw(values, kind.name, (0.0, 1.0), inverted)
    size = bits or 8 * kind.itemsize
    name = f"{'u' if kind.kind == 'u' else ''}int{size}"
    low = 0 if kind.kind == "u" else -(2 ** (size - 1))
    return Raw(values, name if size > 8 else EIGHT_BITS, (float(low), float(low + 2**size - 1)), inverted)


def measure(found: Raw) -> Measured:
    """A picture's least and greatest value, and zero, of the pixels that are not wholly transparent.

    Raises:
        DataError: If one is not finite, or is so large that it marks missing pixels.
    """
    seen = found.values if found.alpha is None else found.values[found.alpha > 0]
    low, high = float(seen.min(initial=0)), float(seen.max(initial=0))
    if not (abs(low) <= _LARGEST and abs(high) <= _LARGEST):  # as nothing that is compared with NaN is true
        raise DataError(f"it has values from {low:g} to {high:g}, which stand for missing pixels; replace them")
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
    return {name: (_black(lows[name]), _white(highs[name], name)) for name in sorted(stated)}


def few_levels(measured: Iterable[Measured], ranges: Mapping[str, Range]) -> list[str]:
    """Warnings of depths in which over a quarter of the pictures have fewer than 16 of the 256 grey levels.

    A hot pixel may have set the white, a mark of missing pixels the black, or cameras of 12 and 16 bits are mixed.
    """
    spans: dict[str, list[float]] = {}
    for one in measured:
        spans.setdefault(one.depth, []).append(one.high - one.low)
    warnings = []
    for name, found in spans.items():
        black, white = ranges[name]
        few = sum(span < (white - black) / _FEW for span in found)
        if 4 * few > len(found):
            warnings.append(
                f"{few} of {len(found)} images of {name} pixels get fewer than {_FEW} of 256 grey levels, as "
                f"{black:.10g} is black and {white:.10g} is white; if few pixels or images have such values, mend them "
                "or set data.white"
            )
    return warnings


def _black(low: float) -> float:
    """0, or -2ⁿ where there are negative values."""
    return -(2.0 ** math.ceil(math.log2(-low))) if low < 0 else 0.0


def _white(high: float, depth: str) -> float:
    """2ⁿ - 1 for whole numbers, 2ⁿ for floats; any white for what has no light."""
    if depth.startswith("float"):
        return 2.0 ** math.ceil(math.log2(high)) if high else 1.0
    return 2.0 ** max(1, int(high).bit_length()) - 1


def to_8_bits(found: Raw, ranges: Mapping[str, Range]) -> NDArray[np.uint8]:
    """Pixels from 0 to 255; see `scaled`.

    Raises:
        DataError: As `measure`, or if `ranges` has no such depth: then no training image had it, and nobody knows its
            white.
    """
    ends = found.stated
    if found.is_deep:
        measure(found)
        if found.depth not in ranges:
            raise DataError(f"its pixels are {found.depth}, as those of no training image are; convert it to 8 bits")
        ends = ranges[found.depth]
    pixels = scaled(found.values, ends)
    return 255 - pixels if found.inverted else pixels


def scaled(values: NDArray[Any], ends: Range) -> NDArray[np.uint8]:
    """Values from 0 to 255, rounded; what lies outside of the ends, black and white, becomes black and white."""
    black, white = ends
    # float32 holds 16 bits exactly, in half the memory.
    levels: NDArray[Any] = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    levels -= black
    levels *= 255 / (white - black)
    pixels: NDArray[np.uint8] = np.rint(levels, out=levels).clip(0, 255, out=levels).astype(np.uint8)
    return pixels
