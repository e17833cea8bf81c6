"""k-means on the embeddings of one encoder: fitted on train, scored on test.

python -m tasks.cluster swav

If there are several processes, each fits on its share of the train embeddings; the main one does all else.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deepclust import distributed, files, seeding
from deepclust.clustering import kmeans
from deepclust.errors import ConfigError
from deepclust.evaluation import metrics
from deepclust.models.devices import default_device
from tasks.cluster import gallery, prototypes
from tasks.shared.operations.params import schema
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout, prepared, stage

MOST_AUTOMATIC_CLUSTERS = 100
_RESTARTED, _MOST_RESTARTS = 50_000, 5  # images in all runs of a fit; runs


class Fit(NamedTuple):
    """The result of one k-means, the same on all processes."""

    centroids: Tensor
    inertia: float


def main() -> None:
    """Run the stage."""
    with stage.running("cluster") as here:
        assert here.encoder
        options = here.params.cluster
        features = {split: torch.from_numpy(rows) for split, rows in prepared.embeddings(here.encoder).items()}
        count = len(features["train"])
        primary = primary_k(options, classes=len(prepared.meta()["classes"]), images=count)
        ks = [primary, *(k for k in options.other_k if k != primary and k <= count)]
        if primary > count:
            raise ConfigError(f"cluster.k: expected at most {count}, the training images; got {primary}; lower it")
        for k in sorted(set(options.other_k) - set(ks) - {primary}):
            say(f"{here.encoder}: k = {k} left out, it is more than the training images ({count})")
        device = default_device()
        if kmeans.engine_used(options.engine, device) != options.engine:
            where = "" if device.type == "cpu" else f" for {device.type}"
            say(f"{here.encoder}: faiss is not installed{where}, nearest centroids by torch")
        fits = fit(features["train"], ks, options, here.params.seed)
        with distributed.together():
            if distributed.is_main():
                _report(here, fits, features, options)


def fit(features: Tensor, ks: list[int], options: schema.Cluster, seed: int) -> dict[int, list[Fit]]:
    """k-means for each k with every seed, each process on its share of the features."""
    points = _points(features[distributed.share(len(features))], options)
    runs = restarts(options, len(features))
    fits: dict[int, list[Fit]] = {k: [] for k in ks}
    for k in ks:
        for number in range(options.seeds):
            own = seeding.derive(seed, "cluster", number)
            found = kmeans.fit(points, k, seed=own, iterations=options.iterations, restarts=runs, engine=options.engine)
            fits[k].append(Fit(found.centroids, found.inertia))
    return fits


def _report(here: stage.Here, fits: dict[int, list[Fit]], features: dict[str, Tensor], options: schema.Cluster) -> None:
    """Scores of every k; tables and pictures of the first."""
    assert here.encoder
    primary = next(iter(fits))
    splits = {split: prepared.load(split, here.encoder) for split in layout.SPLITS}
    scorer = Scorer(_points(features["test"], options), splits["test"].labels, options, here.params.seed)
    scores = {}
    for k in fits:
        scores[k] = scorer.mean(fits[k])
        numbers = [f"{key} {value['mean']:.3f}" for key, value in scores[k].items() if isinstance(value, dict)]
        say(f"{here.encoder}: k = {k}: {', '.join(numbers)}")
    own = prototypes.Prototypes(here.encoder, default_device())
    assigned = {split: own.assign(features[split]) for split in layout.SPLITS}
    other = {str(k): scores[k] for k in fits if k != primary}
    here.metrics({"k": primary, **scores[primary], "other_k": other, "prototypes": own.score(assigned, splits)})
    if table := prototypes.rows(assigned, splits):
        stage.write_text(here.folder / "prototypes.csv", stage.table(table, prototypes.COLUMNS))
    _write(here, _best(fits[primary]).centroids, features, splits, options)


def primary_k(options: schema.Cluster, *, classes: int, images: int) -> int:
    """`cluster.k`, or for `auto` the number of classes; without labels √(images / 2) rounded, between 2 and 100.

    `auto` is at most the number of training images: a class may have none.
    """
    if options.k != "auto":
        return options.k
    wanted = classes if classes >= 2 else min(MOST_AUTOMATIC_CLUSTERS, max(2, round(math.sqrt(images / 2))))
    return min(wanted, images)


def restarts(options: schema.Cluster, images: int) -> int:
    """`cluster.restarts`, or for `auto` more the fewer images there are: a single run of k-means often ends in a poor
    optimum where clusters are small, and costs little there."""
    return options.restarts if options.restarts != "auto" else min(_MOST_RESTARTS, max(1, _RESTARTED // images))


def _points(features: Tensor, options: schema.Cluster) -> Tensor:
    return (F.normalize(features, dim=1) if options.normalise else features).to(default_device())


def _best(fits: list[Fit]) -> Fit:
    return min(fits, key=lambda found: found.inertia)


class Scorer:
    """Scores clusterings of the test points; the distances for the silhouette are computed once."""

    def __init__(self, test: Tensor, labels: np.ndarray, options: schema.Cluster, seed: int) -> None:
        self._test = test
        self._labels = labels
        self._options = options
        order = torch.randperm(len(test), generator=seeding.generator(seed, "silhouette"))
        self._sample = order[: options.silhouette_images].numpy()
        self._distances = metrics.distances(test.cpu().numpy()[self._sample])

    def mean(self, fits: list[Fit]) -> dict[str, Any]:
        """Mean and standard deviation of each metric over the fits, and the sizes of the best one's clusters.

        `stability` is the adjusted Rand index between the clusterings of two fits, over all pairs; of fewer than three
        fits there is none, since one pair has no deviation.
        """
        assigned = [kmeans.assign(self._test, found.centroids, engine=self._options.engine) for found in fits]
        clusterings = [clusters.cpu().numpy() for clusters, _ in assigned]
        scores = [self._score(clusters, squared) for clusters, (_, squared) in zip(clusterings, assigned, strict=True)]
        summary: dict[str, Any] = {
            name: {"mean": float(np.mean(values)), "std": float(np.std(values))}
            for name in scores[0]
            if (values := [score[name] for score in scores if name in score])
        }
        if len(fits) > 2:
            agreements = list(itertools.starmap(metrics.ari, itertools.combinations(clusterings, 2)))
            summary["stability"] = {"mean": float(np.mean(agreements)), "std": float(np.std(agreements))}
        best = int(np.argmin([found.inertia for found in fits]))
        summary["sizes"] = np.bincount(clusterings[best], minlength=len(fits[best].centroids)).tolist()
        return summary

    def _score(self, clusters: NDArray[np.int64], squared: Tensor) -> dict[str, float]:
        known = self._labels >= 0
        scores = {"inertia": float(squared.sum(dtype=torch.float64))}
        silhouette = metrics.silhouette(self._distances, clusters[self._sample])
        if silhouette is not None:
            scores["silhouette"] = silhouette
        measures = {"acc": metrics.matched_accuracy, "nmi": metrics.nmi, "ari": metrics.ari} if known.any() else {}
        return scores | {name: score(self._labels[known], clusters[known]) for name, score in measures.items()}


def _write(
    here: stage.Here,
    centroids: Tensor,
    features: dict[str, Tensor],
    splits: dict[str, prepared.Split],
    options: schema.Cluster,
) -> None:
    """Centroids, the table of assignments and the contact sheet."""
    files.write_array(here.folder / "centroids.npy", centroids.cpu().numpy())
    description = {"k": len(centroids), "normalise": options.normalise}
    stage.write_text(here.folder / "cluster.json", json.dumps(description) + "\n")
    columns = ["split", "index", "path", "cluster", "distance"]
    rows: list[dict[str, Any]] = []
    for name, split in splits.items():
        clusters, squared = kmeans.assign(_points(features[name], options), centroids, engine=options.engine)
        distances = squared.sqrt().tolist()
        found = enumerate(zip(split.paths, clusters.tolist(), distances, strict=True))
        rows += [dict(zip(columns, (name, index, *row), strict=True)) for index, row in found]
        if name == "test":
            sheet = gallery.contact_sheet(
                split.images, clusters.cpu().numpy(), np.array(distances), len(centroids), options.gallery_images
            )
            sheet.save(here.folder / "gallery.png", optimize=True)
    stage.write_text(here.folder / "assignments.csv", stage.table(rows, columns))


if __name__ == "__main__":
    main()
