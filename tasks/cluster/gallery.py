"""A contact sheet: the most central images of each cluster."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_TILES = {0: 56, 96: 96}  # pixels of a tile, from so many pixels of an image on
_GAP = 3
_MARGIN = 92
_BACKGROUND = (255, 255, 255)
_INK = (60, 60, 60)


def contact_sheet(
    images: NDArray[np.uint8], clusters: NDArray[np.int64], distances: NDArray[np.float64], k: int, per_cluster: int
) -> Image.Image:
    """A row for each cluster, the images nearest to the centroid first.

    Args:
        images: (N, H, W, C) uint8.
        clusters: (N,) cluster of each image.
        distances: (N,) distance to its centroid.
        k: Number of clusters; one without images has an empty row.
        per_cluster: Images in a row.
    """
    tile = max(size for least, size in _TILES.items() if images.shape[1] >= least)
    step = tile + _GAP
    sheet = Image.new("RGB", (_MARGIN + per_cluster * step, k * step + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for cluster in range(k):
        top = _GAP + cluster * step
        members = np.flatnonzero(clusters == cluster)
        draw.text((6, top + tile / 2 - 14), f"cluster {cluster}", fill=_INK, font_size=13)
        draw.text((6, top + tile / 2 + 2), f"{len(members)} images", fill=_INK, font_size=11)
        nearest = members[np.argsort(distances[members], kind="stable")][:per_cluster]
        for column, index in enumerate(nearest):
            sheet.paste(_tile(images[index], tile), (_MARGIN + column * step, top))
    return sheet


def _tile(image: NDArray[np.uint8], side: int) -> Image.Image:
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).convert("RGB")
    enlarge = max(picture.size) < side
    return picture.resize((side, side), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)
