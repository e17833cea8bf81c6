"""Contact sheets: rows of images with a caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_TILES = {0: 56, 96: 96}  # pixels of a tile, from so many pixels of an image on
_GAP = 3
_MARGIN, _INDENT = 112, 18
_BACKGROUND = (255, 255, 255)
_INK = (60, 60, 60)


class Row(NamedTuple):
    """A row of a sheet.

    Attributes:
        title: First line of the caption.
        subtitle: Second line.
        images: What is shown, (H, W, C) uint8 each; may be empty.
        depth: Steps by which the row is indented.
    """

    title: str
    subtitle: str
    images: Sequence[NDArray[np.uint8]]
    depth: int = 0


def sheet(rows: Sequence[Row], *, per_row: int, side: int) -> Image.Image:
    """A picture of all rows.

    Args:
        rows: At least one.
        per_row: Most images in a row.
        side: Pixels of a side of the images.
    """
    tile = max(size for least, size in _TILES.items() if side >= least)
    step = tile + _GAP
    margin = _MARGIN + _INDENT * max(row.depth for row in rows)
    picture = Image.new("RGB", (margin + per_row * step, len(rows) * step + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for number, row in enumerate(rows):
        top, left = _GAP + number * step, 6 + _INDENT * row.depth
        draw.text((left, top + tile / 2 - 14), row.title, fill=_INK, font_size=13)
        draw.text((left, top + tile / 2 + 2), row.subtitle, fill=_INK, font_size=11)
        for column, image in enumerate(row.images[:per_row]):
            picture.paste(_tile(image, tile), (margin + column * step, top))
    return picture


def _tile(image: NDArray[np.uint8], side: int) -> Image.Image:
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).convert("RGB")
    enlarge = max(picture.size) < side
    return picture.resize((side, side), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)


def central(
    images: NDArray[np.uint8], clusters: NDArray[np.int64], distances: NDArray[np.float64], cluster: int, most: int
) -> list[NDArray[np.uint8]]:
    """The images of a cluster that are nearest to its centroid, the nearest first."""
    members = np.flatnonzero(clusters == cluster)
    return [images[index] for index in members[np.argsort(distances[members], kind="stable")][:most]]
