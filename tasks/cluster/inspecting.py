"""What else is in the data: copies, outliers, and pictures of which little can be seen; as tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust.clustering import neighbours
from deepclust.clustering.base import USUAL, Points
from deepclust.clustering.neighbours import Neighbours
from deepclust.inspection import duplicates, unusual
from deepclust.inspection.duplicates import Duplicates
from tasks.cluster import gallery
from tasks.shared.outputs import layout, prepared, stage

_ROWS_SHOWN, _IMAGES_SHOWN = 40, 12  # of the pictures


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What was found in the images of train and test.

    Attributes:
        graph: The nearest training images of each training image, itself aside.
        near: The nearest training images of each test image.
        copies: Groups of copies; the images of train come before those of test.
        scores: How unusual each image of a split is, by every measure.
    """

    graph: Neighbours
    near: Neighbours
    copies: Duplicates
    scores: Mapping[str, Mapping[unusual.Kind, unusual.Scores]]

    def metrics(self) -> dict[str, Any]:
        """Numbers of groups and images."""
        counted = {"train": self.copies.within_train(), "test": self.copies.within_test()}
        found: dict[str, Any] = {
            "copies": {name: each._asdict() for name, each in counted.items()}
            | {"between": self.copies.between()._asdict()}
        }
        for split, scores in self.scores.items():
            found[split] = {kind: len(each.listed) for kind, each in scores.items()}
        return found

    def leak(self) -> str:
        """A line that names the test images with a copy in train; empty if there is none."""
        groups, images = self.copies.between()
        if not groups:
            return ""
        test = len(self.copies.groups) - self.copies.train
        have = "has a copy" if images == 1 else "have copies"
        return (
            f"{images:,} of {test:,} test images {have} among the training images (duplicates.csv): "
            f"scores on test may be too good by {images / test:.2g}"
        )

    def write(self, here: stage.Here, splits: Mapping[str, prepared.Split]) -> None:
        """Tables of all that was found, and pictures of its beginning."""
        paths = [(name, index, path) for name, split in splits.items() for index, path in enumerate(split.paths)]
        images = [split.images for split in splits.values()]
        rows = [
            dict(zip(("group", "split", "index", "path"), (group, *paths[item]), strict=True))
            for group, members in enumerate(self.copies.members())
            for item in members.tolist()
        ]
        stage.write_text(here.folder / "duplicates.csv", stage.table(rows, ["group", "split", "index", "path"]))
        exact = {tuple(pair) for pair in self.copies.pairs[self.copies.exact].tolist()}
        sheet = [
            gallery.Row(
                f"group {number}", _told(members, exact, self.copies.train), [_image(images, item) for item in members]
            )
            for number, members in enumerate(self.copies.members()[:_ROWS_SHOWN])
        ]
        _save(here, "duplicates.png", sheet, images)
        listed = [
            {
                "kind": kind,
                "split": name,
                "index": int(index),
                "path": splits[name].paths[index],
                "score": float(found.values[index]),
            }
            for name, scores in self.scores.items()
            for kind, found in scores.items()
            for index in found.listed
        ]
        stage.write_text(here.folder / "unusual.csv", stage.table(listed, ["kind", "split", "index", "path", "score"]))
        # The farthest images are shown in any case: a few intruders are among them, though a threshold may miss them.
        sheet = []
        for name, scores in self.scores.items():
            for kind, found in scores.items():
                order = np.argsort(-found.values, kind="stable") if kind == "outlier" else found.listed
                shown = [splits[name].images[index] for index in order[:_IMAGES_SHOWN]]
                if shown:
                    sheet.append(gallery.Row(kind, f"{len(found.listed):,} in {name}", shown))
        _save(here, "unusual.png", sheet, images)


def inspect(here: stage.Here, everything: Points, test: Tensor) -> Inspected:
    """Look for copies and unusual images.

    Args:
        here: The stage.
        everything: All training images.
        test: (N, D) features of the test images.
    """
    assert here.encoder
    images = {split: prepared.images(split, here.encoder) for split in layout.SPLITS}
    graph, train = everything.graph(USUAL), everything.features
    near = neighbours.search(test, train, USUAL)
    # A copy in the other split is found from the side of test: of each test image the nearest in both.
    among = neighbours.graph(test, USUAL)
    found = torch.cat([near.indices, among.indices + len(train)], dim=1)
    order = torch.cat([near.similarities, among.similarities], dim=1).argsort(dim=1, descending=True, stable=True)
    width = min(graph.indices.shape[1], found.shape[1])
    of_test = found.gather(1, order)[:, :width]
    copies = duplicates.find(images["train"], images["test"], torch.cat([graph.indices[:, :width], of_test]))
    return Inspected(
        graph=graph,
        near=near,
        copies=copies,
        scores={
            "train": unusual.find(images["train"], graph.similarities),
            "test": unusual.find(images["test"], near.similarities),
        },
    )


def _told(members: NDArray[np.int64], exact: set[tuple[int, int]], train: int) -> str:
    same = sum((members[0], other) in exact for other in members[1:].tolist())
    kind = "the same" if same == len(members) - 1 else "alike"
    across = ", both splits" if (members < train).any() and (members >= train).any() else ""
    return f"{len(members)} {kind}{across}"


def _image(images: list[NDArray[np.uint8]], item: int) -> NDArray[np.uint8]:
    train, test = images
    found: NDArray[np.uint8] = train[item] if item < len(train) else test[item - len(train)]
    return found


def _save(here: stage.Here, name: str, rows: list[gallery.Row], images: list[NDArray[np.uint8]]) -> None:
    if rows:
        gallery.sheet(rows, per_row=_IMAGES_SHOWN, side=images[0].shape[1]).save(here.folder / name, optimize=True)
