"""Drawing a share of every class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stratified(labels: NDArray[np.int64], fraction: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw a share of each label's items.

    Of two or more items at least one is drawn and at least one is left; a single item is never drawn.

    Args:
        labels: (N,) any numbers; each value is a stratum.
        fraction: Share to draw, between 0 and 1.
        rng: Draws.

    Returns:
        Sorted indices of the drawn items.
    """
    drawn = [np.empty(0, np.int64)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            drawn.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(drawn)).astype(np.int64)
