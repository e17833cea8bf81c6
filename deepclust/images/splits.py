"""Training, held-out and test images, drawn by what an image is, so that no other image moves it to another side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def groups(ids: Sequence[str], pixels: Sequence[bytes]) -> list[str]:
    """The group of identical images that each belongs to, named by the smallest id in it.

    Args:
        ids: Of N images; equal ids mean equal pixels.
        pixels: A hash of each image's pixels.
    """
    smallest: dict[bytes, str] = {}
    for one, key in zip(ids, pixels, strict=True):
        smallest[key] = min(one, smallest.get(key, one))
    return [smallest[key] for key in pixels]


def drawn(group_of: Sequence[str], fraction: float, *, seed: int, what: str) -> NDArray[np.bool_]:
    """Draw a share of the images.

    A group is drawn if its own number in [0, 1), which follows from the seed and its name alone, is below the fraction.
    Only where that would draw none of several groups, or leave none, the one with the least or greatest number changes
    over.

    Args:
        group_of: Of N images.
        fraction: Share to draw, between 0 and 1.
        seed: Draws.
        what: What is drawn; different draws are independent.

    Returns:
        (N,) whether each image is drawn.
    """
    numbers = {group: _uniform(seed, what, group) for group in sorted(set(group_of))}
    chosen = {group for group, number in numbers.items() if number < fraction}
    if len(numbers) > 1 and not chosen:
        chosen.add(min(numbers, key=numbers.__getitem__))
    elif len(numbers) > 1 and len(chosen) == len(numbers):
        chosen.remove(max(numbers, key=numbers.__getitem__))
    return np.array([group in chosen for group in group_of], bool)


def _uniform(seed: int, what: str, group: str) -> float:
    """A number in [0, 1) with 53 random bits, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{what}/{group}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
