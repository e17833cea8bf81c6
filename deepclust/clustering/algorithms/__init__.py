"""The clustering algorithms by name. Each stands in the file of its name, which is read only when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from deepclust.clustering.assigners import Assigner, Centroids
from deepclust.clustering.base import Problem
from deepclust.config import Config, hint
from deepclust.errors import ConfigError

ALGORITHMS = ("kmeans", "spectral", "gmm", "hdbscan", "ward", "temi", "scan", "swav_head", "dec")


def config_class(name: str) -> type[Config]:
    """The class of an algorithm's options. Raises: ConfigError if there is no such algorithm."""
    found: type[Config] = _module(name).Config
    return found


def fit(name: str, problem: Problem, options: Config) -> Assigner:
    """Cluster points; into one cluster, whatever the algorithm, around their mean.

    Args:
        name: One of `ALGORITHMS`.
        problem: The points, and into how many clusters.
        options: Of its `config_class`.

    Raises:
        ConfigError: If there is no such algorithm.
    """
    if problem.k == 1:
        return Centroids.of(problem.features.mean(0, keepdim=True, dtype=torch.float64).float(), problem.features)
    found: Assigner = _module(name).fit(problem, options)
    return found


def _module(name: str) -> Any:
    if name not in ALGORITHMS:
        raise ConfigError(
            f"expected a clustering algorithm ({', '.join(ALGORITHMS)}), got {name!r}{hint(name, ALGORITHMS)}"
        )
    return import_module(f"{__name__}.{name}")
