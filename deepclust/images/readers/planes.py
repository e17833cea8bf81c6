"""Which pages and bands of a file make its picture, and which way up it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepclust.errors import DataError

_FLIPPED, _MIRRORED = (3, 4, 6, 7), (2, 3, 7, 8)  # EXIF orientations whose rows, or columns, run backwards


def page_numbers(pages: str | int, count: int) -> range:
    """The pages to read, of `count` in the file.

    Args:
        pages: first, middle, max, mean, or a number from 0.
        count: At least 1.

    Raises:
        DataError: If there is no such page.
    """
    if pages in ("max", "mean"):
        return range(count)
    number = {"first": 0, "middle": count // 2}.get(str(pages), pages)
    assert isinstance(number, int)
    if number >= count:
        raise DataError(f"no page {number} (data.pages, from 0): it has {count}")
    return range(number, number + 1)


def band_numbers(bands: tuple[int, ...], count: int) -> tuple[int, ...]:
    """One band (grey) or three (RGB): those asked for, else the first three, or the first of fewer.

    Raises:
        DataError: If there is no such band.
    """
    chosen = bands or ((0, 1, 2) if count >= 3 else (0,))
    if max(chosen) >= count:
        raise DataError(f"no band {max(chosen)} (data.bands, from 0): it has {count}")
    return chosen


def chosen(values: NDArray[Any], bands: tuple[int, ...]) -> NDArray[Any]:
    """Bands of (H, W) or (H, W, B), as (H, W) or (H, W, 3); see `band_numbers`."""
    values = values if values.ndim == 3 else values[..., None]
    numbers = band_numbers(bands, values.shape[2])
    return values[..., numbers[0]] if len(numbers) == 1 else values[..., numbers]


def combined(pictures: Iterable[NDArray[Any]], how: str | int) -> NDArray[Any]:
    """The max, min or mean (float64) of pictures, of which two are held at a time; of one alone, itself."""
    join: Any = {"mean": np.add, "min": np.minimum}.get(str(how), np.maximum)
    total, count = None, 0
    for picture in pictures:
        count += 1
        total = picture if total is None else join(total, picture, dtype=np.float64 if how == "mean" else None)
    assert total is not None
    return total / count if count > 1 and how == "mean" else total


def upright(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn stored rows and columns (H, W, …) as EXIF's or TIFF's tag says; what is not 1 to 8 turns nothing."""
    rows = -1 if orientation in _FLIPPED else 1
    columns = -1 if orientation in _MIRRORED else 1
    turned = values[::rows, ::columns]
    return turned.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else turned
