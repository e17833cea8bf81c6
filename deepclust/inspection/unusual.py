"""Images that may not belong in a data set: outliers among the features; blank, dark, bright and blurred pictures.

What is far from the others in a data set depends on the data set, so that outliers and blurred images are told by the
modified z-score of Iglewicz and Hoaglin (How to Detect and Handle Outliers, 1993), which half of the images can not
spoil. What can not be seen does not depend on it: blank, dark and bright have thresholds in grey levels, of 255.
Scores of images are sorted by, thresholds are for a first look; nothing is left out because of them.

N images, M neighbours.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepclust.inspection import grey

Kind = Literal["outlier", "blank", "dark", "bright", "blurred"]

Z_SCORE = 3.5  # Iglewicz and Hoaglin's; of normal scores one in 4,300 lies beyond it to one side
# Standard deviation of the grey levels. Sensor noise and compression leave about one; as the watchdog's.
FLAT = 2.0
# The 99th percentile of a dark image and the 5th of a bright one: however large a black background is, some of the
# picture can be seen, or not. A quarter of the range from either end.
DARK, BRIGHT = 64.0, 191.0
_SAMPLED = 1600  # pixels of an image, at least, that its percentiles are taken of
_MAD = 0.6745  # median absolute deviation of a standard normal variable


class Scores(NamedTuple):
    """Images by one measure.

    Attributes:
        values: (N,) float32; the higher, the more unusual.
        threshold: Images above it are listed; infinite where the images give none.
    """

    values: NDArray[np.float32]
    threshold: float

    @property
    def listed(self) -> NDArray[np.int64]:
        """Images above the threshold, the most unusual first, equal ones by rising index."""
        order = np.argsort(-self.values, kind="stable")
        return order[self.values[order] > self.threshold]


def find(images: NDArray[np.uint8], similarities_NM: Tensor) -> dict[Kind, Scores]:
    """Scores of all images by every measure.

    `outlier` is the mean distance to the nearest neighbours, between features of length 1; `blank` the negative
    standard deviation of the grey levels, `dark` the negative level that a hundredth of the pixels exceed, `bright` the
    level that a twentieth does not, and `blurred` the negative logarithm of how much of the image is edges: the
    variance of its Laplacian (Pech-Pacheco et al., ICPR 2000) over its own variance. Blank images have no edges; their
    blur is the median.

    Args:
        images: (N, H, W, C) uint8 of 1 or 3 channels; may be a memory map, and is read in blocks.
        similarities_NM: Cosines of the nearest neighbours of each image; M may be 0 where there is one image.
    """
    found = {name: np.zeros(len(images), np.float32) for name in ("blank", "dark", "bright", "blurred")}
    for rows, block in grey.blocks(images):
        levels = grey.luminance(block)
        contrast = levels.std((1, 2), dtype=np.float64)
        step = max(1, int((levels[0].size / _SAMPLED) ** 0.5))
        low, high = np.percentile(levels[:, ::step, ::step].reshape(len(levels), -1), (5, 99), axis=1)
        found["blank"][rows], found["dark"][rows], found["bright"][rows] = -contrast, -high, low
        with np.errstate(divide="ignore", invalid="ignore"):
            found["blurred"][rows] = -np.log(_laplacian(levels).var((1, 2), dtype=np.float64) / contrast**2)
    flat = (found["blank"] > -FLAT) | ~np.isfinite(found["blurred"])
    found["blurred"][flat] = np.median(found["blurred"][~flat]) if not flat.all() else 0
    distances = (2 - 2 * similarities_NM.double()).clamp_min(0).sqrt().cpu().numpy()
    outlier = (distances.mean(1) if distances.shape[1] else np.zeros(len(images))).astype(np.float32)
    return {
        "outlier": Scores(outlier, robust_threshold(outlier)),
        "blank": Scores(found["blank"], -FLAT),
        "dark": Scores(found["dark"], -DARK),
        "bright": Scores(found["bright"], BRIGHT),
        "blurred": Scores(found["blurred"], robust_threshold(found["blurred"][~flat])),
    }


def robust_threshold(values: NDArray[np.float32]) -> float:
    """Above which a modified z-score exceeds `Z_SCORE`; infinite where half of the values or more are the same."""
    if not len(values):
        return float("inf")
    median = np.median(values.astype(np.float64))
    deviation = float(np.median(np.abs(values - median)))
    return float(median + Z_SCORE * deviation / _MAD) if deviation > 0 else float("inf")


def _laplacian(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Second differences (n, H - 2, W - 2) to the four neighbours; of images too small for it, zeros."""
    if min(levels.shape[1:]) < 3:
        return np.zeros_like(levels)
    centre = levels[:, 1:-1, 1:-1]
    around = levels[:, :-2, 1:-1] + levels[:, 2:, 1:-1] + levels[:, 1:-1, :-2] + levels[:, 1:-1, 2:]
    return around - 4 * centre
