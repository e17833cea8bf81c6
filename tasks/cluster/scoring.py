"""Scores of clusterings of the test images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust import seeding
from deepclust.evaluation import metrics


class Scorer:
    """Scores clusterings of the test images; the distances for the silhouette are computed once.

    Args:
        test: (N, D) features.
        labels: (N,) class of each image, -1 where unknown.
        silhouette_images: Images that the silhouette is computed on.
        seed: Decides which.
    """

    def __init__(self, test: Tensor, labels: NDArray[np.int64], *, silhouette_images: int, seed: int) -> None:
        self._labels = labels
        order = torch.randperm(len(test), generator=seeding.generator(seed, "silhouette"))
        self._sample = order[:silhouette_images].numpy()
        self._distances = metrics.distances(test.cpu().numpy()[self._sample])

    def mean(self, clusterings: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
        """Mean and standard deviation of each metric over clusterings (N,) of the test images.

        `acc`, `nmi`, `ari` where there are labels, and `silhouette`. `stability` is the adjusted Rand index between two
        clusterings, over all pairs; of fewer than three there is none, since one pair has no deviation.
        """
        scores = [self._score(clusters) for clusters in clusterings]
        summary: dict[str, Any] = {
            name: _spread(values)
            for name in dict.fromkeys(itertools.chain(*scores))
            if (values := [score[name] for score in scores if name in score])
        }
        if len(clusterings) > 2:
            summary["stability"] = _spread([*itertools.starmap(metrics.ari, itertools.combinations(clusterings, 2))])
        return summary

    def _score(self, clusters: NDArray[np.int64]) -> dict[str, float]:
        silhouette = metrics.silhouette(self._distances, clusters[self._sample])
        known = self._labels >= 0
        measures = {"acc": metrics.matched_accuracy, "nmi": metrics.nmi, "ari": metrics.ari} if known.any() else {}
        scores = {name: score(self._labels[known], clusters[known]) for name, score in measures.items()}
        return scores if silhouette is None else scores | {"silhouette": silhouette}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values))}
