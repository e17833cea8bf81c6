"""Which images are for training, held out, or for testing; identical images are never on two sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepclust.errors import DataError
from deepclust.images import splits
from deepclust.images.source import Source
from tasks.shared.operations.params.schema import Data

Indices = NDArray[np.int64]
_NAMED = 5  # as many classes as a warning names


class Sides(NamedTuple):
    """What becomes of M images.

    Attributes:
        rows: Sorted numbers, among the M, of the images of `train` and `test`.
        heldout: Sorted numbers, among those of `train`, of the labelled ones that are held out.
        left_out: `path` and `reason` of training images that are in neither.
        warnings: What the user should know.
    """

    rows: dict[str, Indices]
    heldout: Indices
    left_out: list[dict[str, str]]
    warnings: list[str]


def settle(source: Source, indices: Indices, ids: Sequence[str], sums: Sequence[bytes], data: Data, seed: int) -> Sides:
    """Decide on the side of each image: the one that the source states, else one drawn by its id.

    Identical images are on one side, that of their smallest id. Where the source states the sides, a training image
    that is identical to a test image is left out, unless the source is published.

    Args:
        source: The images.
        indices: (M,) numbers of those that could be read.
        ids: Of these M.
        sums: A hash of each one's pixels.
        data: With the shares to draw.
        seed: Draws.

    Raises:
        DataError: If no image is left to train or to test on.
    """
    paths = [source.paths[index] for index in indices.tolist()]
    labels = source.labels[indices]
    groups = splits.groups(ids, sums)
    if source.sides is None:
        is_test = splits.drawn(groups, data.test_fraction, seed=seed, what="test")
    else:
        is_test = np.array([source.sides[index] == "test" for index in indices.tolist()], bool)
    tested: dict[str, str] = {}
    for row in np.flatnonzero(is_test).tolist():
        tested.setdefault(groups[row], paths[row])
    in_both = [row for row in np.flatnonzero(~is_test).tolist() if groups[row] in tested]
    is_train = ~is_test
    if not source.published:
        is_train[in_both] = False
    rows = {"train": np.flatnonzero(is_train), "test": np.flatnonzero(is_test)}
    copies = _about_copies(source, groups, labels, len(in_both))
    for split, found in rows.items():
        if not len(found):
            why = "".join(f"; {text}" for text in copies)
            raise DataError(
                f"expected {split} images in {source.name}, got none, of {len(paths)} images in all{why}; add some to "
                "the folder"
            )
    labelled = np.flatnonzero(labels[rows["train"]] >= 0)
    of_labelled = [groups[row] for row in rows["train"][labelled].tolist()]
    return Sides(
        rows=rows,
        heldout=labelled[splits.drawn(of_labelled, data.heldout_fraction, seed=seed, what="heldout")],
        left_out=[
            {"path": paths[row], "reason": f"identical to the test image {tested[groups[row]]}"}
            for row in ([] if source.published else in_both)
        ],
        warnings=copies + _about_classes(source, {split: labels[found] for split, found in rows.items()}),
    )


def _about_copies(source: Source, groups: list[str], labels: Indices, in_both: int) -> list[str]:
    """A warning where images are identical, of which `in_both` are for training and in the test set."""
    copies = len(groups) - len(set(groups))
    if not copies:
        return []
    found: dict[str, set[int]] = {}
    for group, label in zip(groups, labels.tolist(), strict=True):
        found.setdefault(group, set()).update([label] if label >= 0 else [])
    are = "is a copy of another" if copies == 1 else "are copies of others"
    text = f"{copies} of {len(groups)} images {are} (identical bytes or pixels)"
    if odd := sum(len(names) > 1 for names in found.values()):
        text += f", and {odd} {'image has' if odd == 1 else 'images have'} copies with different labels"
    if source.sides is None:
        return [f"{text}; all copies of an image are on one side"]
    also = "1 training image is a test image too" if in_both == 1 else f"{in_both} training images are test images too"
    if source.published:
        what = "stays as published" if in_both == 1 else "stay as published"
    else:
        what = "is left out" if in_both == 1 else "are left out"
    return [f"{text}; {also}, and {what}" if in_both else text]


def _about_classes(source: Source, labels: dict[str, Indices]) -> list[str]:
    """Warnings of classes that no image is there to learn, or (where that is drawn) to test."""
    counts = {split: np.bincount(found[found >= 0], minlength=len(source.classes)) for split, found in labels.items()}
    warnings = []
    for split, other in (("train", "test"), ("test", "train")):
        without = np.flatnonzero((counts[split] == 0) & (counts[other] > 0)).tolist()
        if without and (split == "train" or source.sides is None):
            named = ", ".join(f"{source.classes[number]} ({counts[other][number]})" for number in without[:_NAMED])
            warnings.append(
                f"{len(without)} of {len(source.classes)} classes {'has' if len(without) == 1 else 'have'} no {split} "
                f"image, but {other} images: {named}{' …' if len(without) > _NAMED else ''}; add images"
                + ("" if source.sides else ", set another data.test_fraction, or make a test folder")
            )
    return warnings
