"""Tables and pictures of the clusters that everything after uses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust.clustering import clusters as saving
from deepclust.clustering import confidence
from deepclust.clustering.clusters import Clusters, Judged
from deepclust.clustering.how_many import Estimate
from deepclust.clustering.tree import LEAVES, Cut, Tree
from deepclust.evaluation import metrics
from tasks.cluster import gallery
from tasks.cluster.inspecting import Inspected
from tasks.shared.operations.params import schema
from tasks.shared.operations.text import say
from tasks.shared.outputs import prepared, stage

_COLUMNS = ["split", "index", "path", "cluster", "distance", "margin", "neighbours", "refits", "confidence"]
_MOST_LEAVES = 4000  # of the tree, which takes the cube of it in time where k is small
_MOST_ROWS = 120  # of the tree's picture; finer cuts than fit are in the table alone


def write(
    here: stage.Here,
    clusters: Clusters,
    train: Judged,
    points: dict[str, Tensor],
    splits: dict[str, prepared.Split],
    inspected: Inspected,
    estimate: Estimate | None,
) -> dict[str, Any]:
    """Write all but the metrics, of which some are returned: `sizes`, `rejected`, `coverage`, `other_k`, `estimate`.

    `train` is what the clusters say of the training images.
    """
    options = here.params.cluster
    clusters.save(here.folder)
    judged = {"train": train, "test": clusters.judge(points["test"])}
    kept = {split: clusters.kept(found) for split, found in judged.items()}
    tree = Tree.build(points["train"], judged["train"].clusters, seed=here.params.seed, leaves=_leaves(options))
    cuts = {k: tree.cut(k) for k in _levels(tree, options, here)}
    in_cuts = {split: _in_cuts(tree, cuts, points[split], kept[split]) for split in splits}
    # Scores are of all images, as those of the primary are: what is rejected would count as a cluster of its own.
    scored = _in_cuts(tree, cuts, points["test"], judged["test"].clusters)
    agreement = _agreement(judged, inspected)
    _assignments(here, splits, judged, kept, agreement, in_cuts)
    _gallery(here, clusters, splits["test"], judged["test"], kept["test"])
    levels = {**cuts, tree.k: tree.cut(tree.k)}
    _tree(here, {k: levels[k] for k in sorted(levels)}, tree, splits["test"], points["test"], kept["test"])
    inspected.write(here, splits)
    if estimate is not None and estimate.table:
        tried = [dataclasses.asdict(candidate) for candidate in estimate.table]
        stage.write_text(here.folder / "how_many.csv", stage.table(tried, list(tried[0])))
    test = kept["test"].cpu().numpy()
    labels = splits["test"].labels
    found: dict[str, Any] = {
        "sizes": np.bincount(test[test >= 0], minlength=clusters.k).tolist(),
        "rejected": {split: int((each < 0).sum()) for split, each in kept.items()},
        "other_k": {
            str(k): _scores(scored[k], labels) | {"sizes": np.bincount(own[own >= 0], minlength=k).tolist()}
            for k, own in in_cuts["test"].items()
        },
    }
    known = labels >= 0
    if known.any():
        rows = confidence.table(
            labels[known], judged["test"].clusters.cpu().numpy()[known], judged["test"].scores.cpu().numpy()[known]
        )
        found["coverage"] = {f"{row.coverage:g}": row.accuracy for row in rows}
    if estimate is not None:
        found["estimate"] = {name: getattr(estimate, name) for name in ("k", "sure", "interval", "edge", "reason")} | {
            "runners_up": [candidate.k for candidate in estimate.runners_up]
        }
    return found


def _leaves(options: schema.Cluster) -> int:
    """Leaves of the tree: several for each cluster of the finest cut."""
    return min(_MOST_LEAVES, max(LEAVES, 4 * max(options.other_k, default=0)))


def _levels(tree: Tree, options: schema.Cluster, here: stage.Here) -> list[int]:
    """The numbers of clusters to cut the tree at, less those that it can not have."""
    wanted = sorted({k for k in options.other_k if k != tree.k})
    for k in wanted:
        if k > tree.leaves:
            say(f"{here.encoder}: other_k {k} left out, it is more than the leaves of the tree ({tree.leaves})")
    return [k for k in wanted if k <= tree.leaves]


def _in_cuts(tree: Tree, cuts: dict[int, Cut], points: Tensor, kept: Tensor) -> dict[int, NDArray[np.int64]]:
    leaves = tree.assign(points, kept)
    return {k: torch.where(leaves >= 0, cut.leaves[leaves], saving.NONE).cpu().numpy() for k, cut in cuts.items()}


def _scores(clusters: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Of one cut; there is one tree, so no deviation."""
    known = labels >= 0
    measures = {"acc": metrics.matched_accuracy, "nmi": metrics.nmi, "ari": metrics.ari} if known.any() else {}
    return {name: {"mean": score(labels[known], clusters[known]), "std": 0.0} for name, score in measures.items()}


def _agreement(judged: dict[str, Judged], inspected: Inspected) -> dict[str, Tensor]:
    """Share of each image's nearest training images that are in its cluster; NaN where there is no other image."""
    of = judged["train"].clusters
    near = {"train": inspected.graph.indices, "test": inspected.near.indices}
    return {split: confidence.neighbours_agreement(judged[split].clusters, near[split], of) for split in near}


def _assignments(
    here: stage.Here,
    splits: dict[str, prepared.Split],
    judged: dict[str, Judged],
    kept: dict[str, Tensor],
    agreement: dict[str, Tensor],
    in_cuts: dict[str, dict[int, NDArray[np.int64]]],
) -> None:
    """The table of all images."""
    levels = {f"cluster_{k}": k for k in in_cuts["train"]}
    rows: list[dict[str, Any]] = []
    for name, split in splits.items():
        found = judged[name]
        of = (kept[name], found.distances, found.margins, agreement[name], found.agreements, found.scores)
        columns = dict(zip(_COLUMNS[3:], (each.tolist() for each in of), strict=True))
        columns |= {level: in_cuts[name][k].tolist() for level, k in levels.items()}
        rows += [
            {"split": name, "index": index, "path": path}
            | {column: values[index] for column, values in columns.items()}
            for index, path in enumerate(split.paths)
        ]
    for row in rows:
        for column in ("neighbours", "refits"):  # where there are none, there is no share of them
            if math.isnan(row[column]):
                row[column] = ""
    stage.write_text(here.folder / "assignments.csv", stage.table(rows, [*_COLUMNS, *levels]))


def _gallery(here: stage.Here, clusters: Clusters, split: prepared.Split, judged: Judged, kept: Tensor) -> None:
    own, distances = kept.cpu().numpy(), judged.distances.cpu().numpy().astype(np.float64)
    most, sizes = here.params.cluster.gallery_images, np.bincount(own[own >= 0], minlength=clusters.k)
    rows = [
        gallery.Row(f"cluster {k}", f"{sizes[k]:,} images", gallery.central(split.images, own, distances, k, most))
        for k in range(clusters.k)
    ]
    if (own < 0).any():
        unsure = np.flatnonzero(own < 0)
        order = unsure[np.argsort(judged.scores.cpu().numpy()[unsure], kind="stable")][:most]
        rows.append(gallery.Row("no cluster", f"{len(unsure):,} images", [split.images[index] for index in order]))
    picture = gallery.sheet(rows, per_row=most, side=split.images.shape[1])
    picture.save(here.folder / "gallery.png", optimize=True)


def _tree(
    here: stage.Here, levels: dict[int, Cut], tree: Tree, split: prepared.Split, points: Tensor, kept: Tensor
) -> None:
    """The picture of the cuts, each cluster above those that it is divided into; none of a single cut."""
    shown: dict[int, Cut] = {}
    for k, cut in levels.items():
        if not shown or sum(shown) + k <= _MOST_ROWS:
            shown[k] = cut
    if len(shown) < 2:
        return
    own = _in_cuts(tree, shown, points, kept)
    distances = {
        k: (points - cut.centroids[torch.from_numpy(own[k]).to(points.device)]).norm(dim=1).cpu().numpy()
        for k, cut in shown.items()
    }
    given = torch.unique(tree.given).tolist()  # the tree numbers those that have points without gaps
    depths, most = {k: depth for depth, k in enumerate(shown)}, here.params.cluster.gallery_images
    rows: list[gallery.Row] = []

    def add(k: int, cluster: int) -> None:
        count, finer = int((own[k] == cluster).sum()), [*shown][depths[k] + 1 :][:1]
        images = gallery.central(split.images, own[k], distances[k], cluster, most)
        name = f"cluster {given[cluster]}" if k == tree.k else f"{cluster} of {k}"
        rows.append(gallery.Row(name, f"{count:,} images", images, depths[k]))
        for level in finer:
            for child in (shown[level].parents(shown[k]) == cluster).nonzero().flatten().tolist():
                add(level, child)

    coarsest = next(iter(shown))
    for cluster in range(coarsest):
        add(coarsest, cluster)
    gallery.sheet(rows, per_row=most, side=split.images.shape[1]).save(here.folder / "tree.png", optimize=True)
