"""Fits of every algorithm, and which of an algorithm's fits stands for it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust import distributed, seeding
from deepclust.clustering import algorithms, choice
from deepclust.clustering.assigners import Assigner
from deepclust.clustering.base import Points, Problem
from deepclust.clustering.neighbours import Neighbours
from deepclust.config import Config
from deepclust.evaluation import metrics
from tasks.shared.operations.text import say

_SHARDED = ("kmeans",)  # each process fits on its share of the points; the others run on the main process alone


class Fit(NamedTuple):
    """One fit of an algorithm.

    Attributes:
        assigner: What assigns images.
        clusters: (N,) int64 cluster of each training image.
    """

    assigner: Assigner
    clusters: NDArray[np.int64]


def fit(
    points: Points, everything: Tensor, k: int, chosen: Mapping[str, Config], *, seeds: int, seed: int
) -> dict[str, list[Fit]]:
    """Fit every algorithm with every seed.

    Args:
        points: Points to fit on.
        everything: (N, D) features of all training images, which are assigned.
        k: Number of clusters.
        chosen: The algorithms, with their options.
        seeds: Fits of each.
        seed: Decides the randomness of all.

    Returns:
        The fits of each algorithm, on the main process; on the others those of the sharded ones.
    """
    found: dict[str, list[Fit]] = {}
    for name, options in chosen.items():
        problems = [
            Problem(points=points, k=k, seed=seeding.derive(seed, "cluster", number)) for number in range(seeds)
        ]
        if name in _SHARDED:
            found[name] = [_fitted(name, problem, options, everything) for problem in problems]
            continue
        with distributed.by_main() as main:
            if main:
                found[name] = [_fitted(name, problem, options, everything) for problem in problems]
                say(f"{name}: {seeds} fits of {k} clusters")
    return found


def _fitted(name: str, problem: Problem, options: Config, everything: Tensor) -> Fit:
    assigner = algorithms.fit(name, problem, options)
    return Fit(assigner, assigner.assign(everything).cpu().numpy())


def information(fits: list[Fit], graph: Neighbours) -> dict[str, float]:
    """Mean and standard deviation over fits of what the label-free choice goes by (deepclust/clustering/choice.py)."""
    clusterings = [torch.from_numpy(fit.clusters).to(graph.indices.device) for fit in fits]
    values = [
        choice.information(clusters, graph, fit.assigner.k) if fit.assigner.k > 1 else 0.0
        for clusters, fit in zip(clusterings, fits, strict=True)
    ]
    return {"mean": float(np.mean(values)), "std": float(np.std(values))}


def typical(fits: list[Fit]) -> int:
    """Index of the fit that agrees most with the others, by the mean adjusted Rand index; of equals the first."""
    agreement = np.zeros((len(fits), len(fits)))
    for one, other in itertools.combinations(range(len(fits)), 2):
        agreement[one, other] = agreement[other, one] = metrics.ari(fits[one].clusters, fits[other].clusters)
    return int(agreement.sum(axis=1).round(9).argmax())
