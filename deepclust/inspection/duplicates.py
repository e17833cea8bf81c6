"""Images that are in a data set more than once: the same pixels, or the same picture mirrored, cropped or saved anew.

Exact copies have the same pixels. Pairs that may be near copies are neighbours in the features, among the nearest
`NEAREST`; one is laid onto the other (`registration`), and of what both show, the perceptual hashes are compared. A
hash alone misses crops, and calls many different pictures alike: of 28x28 pixels, most shirts.

The thresholds were chosen on copies of 500 images of Tiny ImageNet (64 px), and so that the pairs found in
Fashion-MNIST are copies to the eye.

N images, those of train before those of test; M neighbours, P pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import imagehash
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from deepclust.inspection import grey, registration

# Neighbours that an image is compared with, exact copies of it aside. Copies were among the nearest three, always.
NEAREST = 3
# Correlation as they lie on each other at first, and that of details in the end. 99 % of crops had more than .80 and
# .86; of other neighbours, 1 ‰ had more than .95 and .57.
ALIKE, DETAILS = 0.7, 0.8
# Grey levels, of 255, between the means of a patch in both; 98 % of copies had less than 6. Other colours and other
# prints on the same garment have more.
SHADES = 8.0
_PATCH = 6  # pixels a side
# The hash has 16² bits. Those of 98 % of the copies differed in at most 18, those of 1 ‰ of other neighbours in fewer
# than 78.
HASH_SIZE, HASH_BITS = 16, 20
_PAIRS_AT_ONCE = 4096


class Counted(NamedTuple):
    """Groups of copies, and the images in them that count."""

    groups: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Copies of images.

    Attributes:
        pairs: (P, 2) int64, sorted, the lower index first; the first of equal images is paired with each of the
            others, and stands for all of them in near pairs.
        exact: (P,) bool, whether the pixels of a pair are the same.
        groups: (N,) int64, the group of an image by rising first member; -1 of an image without copies.
        train: Number of training images, which come first.
    """

    pairs: NDArray[np.int64]
    exact: NDArray[np.bool_]
    groups: NDArray[np.int64]
    train: int

    def members(self) -> list[NDArray[np.int64]]:
        """The images of each group, by rising index."""
        order = np.argsort(self.groups, kind="stable")
        alone = int((self.groups < 0).sum())
        ends = np.flatnonzero(np.diff(self.groups[order][alone:])) + 1
        return np.split(order[alone:], ends) if alone < len(order) else []

    def within_train(self) -> Counted:
        """Groups with two training images or more, and how many training images these hold."""
        return self._within(self.groups[: self.train])

    def within_test(self) -> Counted:
        """Likewise of test."""
        return self._within(self.groups[self.train :])

    def between(self) -> Counted:
        """Groups with images of both, and how many test images have a copy in train."""
        shared = np.intersect1d(self.groups[: self.train], self.groups[self.train :])
        shared = shared[shared >= 0]
        return Counted(len(shared), int(np.isin(self.groups[self.train :], shared).sum()))

    def kept(self) -> NDArray[np.int64]:
        """Training images without later copies: of each group the first, and all that have no copy."""
        groups = self.groups[: self.train]
        _, first = np.unique(groups, return_index=True)
        keep = groups < 0
        keep[first] = True
        return np.flatnonzero(keep)

    @staticmethod
    def _within(groups: NDArray[np.int64]) -> Counted:
        sizes = np.bincount(groups[groups >= 0])
        return Counted(int((sizes > 1).sum()), int(sizes[sizes > 1].sum()))


def find(train: NDArray[np.uint8], test: NDArray[np.uint8], neighbours_NM: Tensor) -> Duplicates:
    """Find all copies, also between train and test.

    Args:
        train: (n, H, W, C) uint8, C 1 or 3; may be a memory map, as it is read in blocks.
        test: Likewise; may be empty.
        neighbours_NM: int64, the nearest neighbours of each image in the features of both, the nearest first; M may be
            0 where there is one image. Near copies of an image that has M exact ones or more may be missed.
    """
    count = len(train) + len(test)
    assert len(neighbours_NM) == count, f"{len(neighbours_NM)} rows of neighbours for {count} images"
    same, thumbnails = _scanned([train, test])
    exact = np.flatnonzero(same < np.arange(count))
    equal = np.stack([same[exact], exact], 1)
    near = _near(thumbnails, _candidates(same, neighbours_NM.cpu().numpy()))
    pairs = np.concatenate([equal, near])
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return Duplicates(
        pairs=pairs[order],
        exact=(np.arange(len(pairs)) < len(equal))[order],
        groups=_groups(pairs, count),
        train=len(train),
    )


def _scanned(parts: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.int64], Tensor]:
    """The first image with the same pixels for each image (N,), and thumbnails (N, S, S) uint8."""
    side = registration.SIDE
    thumbnails = torch.empty(sum(map(len, parts)), side, side, dtype=torch.uint8)
    first: dict[bytes, int] = {}
    same: list[int] = []
    for images in parts:
        start = len(same)
        for rows, block in grey.blocks(images):
            levels = torch.from_numpy(grey.luminance(block))[:, None]
            small = F.interpolate(levels, (side, side), mode="bilinear", antialias=True, align_corners=False)
            thumbnails[start + rows.start : start + rows.stop] = small[:, 0].round().byte()
            for image in block:
                digest = hashlib.sha256(image.tobytes()).digest()
                same.append(first.setdefault(digest, len(same)))
    return np.array(same, np.int64), thumbnails


def _candidates(same: NDArray[np.int64], neighbours: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs of different pixels whose features are neighbours; equal images are represented by the first."""
    others = same[neighbours]
    different = others != same[:, None]
    chosen = different & (different.cumsum(1) <= NEAREST)
    pairs = np.stack([np.broadcast_to(same[:, None], others.shape)[chosen], others[chosen]], 1)
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _near(thumbnails: Tensor, candidates: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of the candidates that show the same picture."""
    found = []
    for start in range(0, len(candidates), _PAIRS_AT_ONCE):
        block = candidates[start : start + _PAIRS_AT_ONCE]
        images, index = np.unique(block, return_inverse=True)
        levels, pairs = thumbnails[torch.from_numpy(images)].float(), torch.from_numpy(index.reshape(-1, 2))
        placed = registration.coarse(levels, pairs)
        pairs, placed, rows = _those(placed.correlation > ALIKE, pairs, placed, torch.arange(len(pairs)))
        placed = registration.refined(levels, pairs, placed)
        pairs, placed, rows = _those(placed.correlation > DETAILS, pairs, placed, rows)
        first, second, seen = registration.overlaid(levels, pairs, placed)
        alike = _difference(first, second, seen) < SHADES
        bits = _hash_distances(first[alike], second[alike], seen[alike])
        found.append(block[rows[alike].numpy()[bits <= HASH_BITS]])
    return np.concatenate([np.empty((0, 2), np.int64), *found])


def _those(
    chosen: Tensor, pairs: Tensor, placed: registration.Placement, rows: Tensor
) -> tuple[Tensor, registration.Placement, Tensor]:
    return pairs[chosen], placed.of(chosen), rows[chosen]


def _difference(first: Tensor, second: Tensor, seen: Tensor) -> Tensor:
    """The largest difference (P,) between the mean levels of two patches at the same place."""
    means = F.avg_pool2d(((first - second) * seen)[:, None], _PATCH, _PATCH // 3)
    return means.abs().flatten(1).amax(1)


def _hash_distances(first: Tensor, second: Tensor, seen: Tensor) -> NDArray[np.int64]:
    """Bits (P,) in which the perceptual hashes of what both images of a pair show differ."""
    distances = np.zeros(len(first), np.int64)
    for pair, part in enumerate(seen):
        rows, columns = part.any(1).nonzero()[:, 0], part.any(0).nonzero()[:, 0]
        box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        one, other = (
            imagehash.phash(Image.fromarray(picture[pair][box].round().byte().numpy()), hash_size=HASH_SIZE)
            for picture in (first, second)
        )
        distances[pair] = one - other
    return distances


def _groups(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The group of each image, numbered by rising first member; -1 of images without a pair."""
    graph = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (count, count))
    _, labels = connected_components(graph, directed=False)
    groups = np.full(count, -1, np.int64)
    paired = np.unique(pairs)
    if len(paired):
        _, first, inverse = np.unique(labels[paired], return_index=True, return_inverse=True)
        groups[paired] = first.argsort().argsort()[inverse]
    return groups
