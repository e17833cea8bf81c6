"""k-means on the embeddings of one encoder: fitted on train, scored on test.

python -m tasks.cluster swav
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust import kmeans, metrics, seeding
from deepclust.devices import default_device
from deepclust.errors import ConfigError
from tasks import gallery, layout, prepared, prototypes, sections, stage

MOST_AUTOMATIC_CLUSTERS = 100


def main() -> None:
    """Run the stage."""
    with stage.running("cluster") as here:
        assert here.encoder
        options = here.params.cluster
        device = default_device()
        splits = {split: prepared.load(split) for split in layout.SPLITS}
        points = {split: _load(here.encoder, split, options.normalise).to(device) for split in layout.SPLITS}
        primary = primary_k(options, classes=len(prepared.meta()["classes"]), images=len(points["train"]))
        ks = [primary, *(k for k in options.other_k if k != primary and k <= len(points["train"]))]
        if primary > len(points["train"]):
            raise ConfigError(
                f"cluster.k: expected at most {len(points['train'])}, the training images; got {primary}; lower it"
            )
        for k in sorted(set(options.other_k) - set(ks) - {primary}):
            print(f"{here.encoder}: k = {k} left out, there are only {len(points['train'])} training images")
        scores, best = {}, {}
        scorer = Scorer(points["test"], splits["test"].labels, options, here.params.seed)
        for k in ks:
            scores[k], best[k] = scorer.mean(points["train"], k, here.params.seed)
            print(
                f"{here.encoder}: k = {k}: "
                + ", ".join(
                    f"{key} {value['mean']:.3f}" for key, value in scores[k].items() if isinstance(value, dict)
                ),
                flush=True,
            )
        own = prototypes.Prototypes(here.encoder, device)
        assigned = {
            split: own.assign(_load(here.encoder, split, normalise=False).to(device)) for split in layout.SPLITS
        }
        here.metrics(
            {
                "k": primary,
                **scores[primary],
                "other_k": {str(k): scores[k] for k in ks if k != primary},
                "prototypes": own.score(assigned, splits),
            }
        )
        if table := prototypes.rows(assigned, splits):
            stage.write_text(here.folder / "prototypes.csv", stage.table(table, prototypes.COLUMNS))
        _write(here, best[primary], points, splits, options)


def primary_k(options: sections.Cluster, *, classes: int, images: int) -> int:
    """`cluster.k`; automatic: the number of classes, without labels √(images / 2) rounded, between 2 and 100."""
    if options.k != "auto":
        return options.k
    return classes if classes >= 2 else min(MOST_AUTOMATIC_CLUSTERS, max(2, round(math.sqrt(images / 2))))


def _load(encoder: str, split: str, normalise: bool) -> Tensor:
    features = torch.from_numpy(np.load(layout.embeddings(encoder, split), allow_pickle=False))
    return F.normalize(features, dim=1) if normalise else features


class Scorer:
    """Scores clusterings of the test points; the distances for the silhouette are computed once."""

    def __init__(self, test: Tensor, labels: np.ndarray, options: sections.Cluster, seed: int) -> None:
        self._test = test
        self._labels = labels
        self._options = options
        order = torch.randperm(len(test), generator=seeding.generator(seed, "silhouette"))
        self._sample = order[: options.silhouette_images].numpy()
        self._distances = metrics.distances(test.cpu().numpy()[self._sample])

    def mean(self, train: Tensor, k: int, seed: int) -> tuple[dict[str, Any], kmeans.Clusters]:
        """Fit with every seed.

        Returns:
            Mean and standard deviation of each metric over the seeds, and the fit of the lowest inertia on train.
        """
        fits = [
            kmeans.fit(train, k, seed=seeding.derive(seed, "cluster", number), iterations=self._options.iterations)
            for number in range(self._options.seeds)
        ]
        scores = [self._score(found) for found in fits]
        best = min(fits, key=lambda found: found.inertia)
        summary: dict[str, Any] = {
            name: {"mean": float(np.mean(values)), "std": float(np.std(values))}
            for name in scores[0]
            if (values := [score[name] for score in scores if name in score])
        }
        test_clusters, _ = kmeans.assign(self._test, best.centroids)
        summary["sizes"] = torch.bincount(test_clusters, minlength=k).tolist()
        return summary, best

    def _score(self, found: kmeans.Clusters) -> dict[str, float]:
        assigned, squared = kmeans.assign(self._test, found.centroids)
        clusters = assigned.cpu().numpy()
        known = self._labels >= 0
        scores = {"inertia": float(squared.sum(dtype=torch.float64))}
        silhouette = metrics.silhouette(self._distances, clusters[self._sample])
        if silhouette is not None:
            scores["silhouette"] = silhouette
        if known.any():
            scores["acc"] = metrics.matched_accuracy(self._labels[known], clusters[known])
            scores["nmi"] = metrics.nmi(self._labels[known], clusters[known])
            scores["ari"] = metrics.ari(self._labels[known], clusters[known])
        return scores


def _write(
    here: stage.Here,
    best: kmeans.Clusters,
    points: dict[str, Tensor],
    splits: dict[str, prepared.Split],
    options: sections.Cluster,
) -> None:
    """Centroids, the table of assignments and the contact sheet."""
    np.save(here.folder / "centroids.npy", best.centroids.cpu().numpy())
    description = {"k": len(best.centroids), "normalise": options.normalise}
    stage.write_text(here.folder / "cluster.json", json.dumps(description) + "\n")
    rows: list[dict[str, Any]] = []
    for name, split in splits.items():
        clusters, squared = kmeans.assign(points[name], best.centroids)
        distances = squared.sqrt().tolist()
        rows += (
            {
                "split": name,
                "index": index,
                "path": split.paths[index],
                "cluster": cluster,
                "distance": distances[index],
            }
            for index, cluster in enumerate(clusters.tolist())
        )
        if name == "test":
            sheet = gallery.contact_sheet(
                split.images, clusters.cpu().numpy(), np.array(distances), len(best.centroids), options.gallery_images
            )
            sheet.save(here.folder / "gallery.png", optimize=True)
    stage.write_text(
        here.folder / "assignments.csv", stage.table(rows, ["split", "index", "path", "cluster", "distance"])
    )


if __name__ == "__main__":
    main()
