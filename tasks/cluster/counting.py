"""How many clusters are made: as many as is stated, as there are classes, or as is estimated."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deepclust import distributed
from deepclust.clustering import how_many
from deepclust.clustering.base import Points
from deepclust.clustering.how_many import Estimate
from deepclust.errors import ConfigError
from deepclust.models.devices import default_device
from tasks.shared.operations.text import say
from tasks.shared.outputs import prepared, stage


def wanted(here: stage.Here, points: Points) -> tuple[int, Estimate | None]:
    """The number of clusters, the same on every process; on the main one with the estimate, if it is one.

    Raises:
        ConfigError: If more are stated than there are points.
    """
    options, count, classes = here.params.cluster, len(points), len(prepared.meta()["classes"])
    if isinstance(options.k, int):
        if options.k > count:
            raise ConfigError(
                f"cluster.k: expected at most {count}, the training images fitted on; got {options.k}; lower it"
            )
        return options.k, None
    if options.k == "classes" and classes >= 2:
        return min(classes, count), None
    estimate, found = None, torch.zeros(1, dtype=torch.int64, device=default_device())
    with distributed.by_main() as main:
        if main:
            estimate = how_many.estimate(points.features, options.how_many(), seed=here.params.seed)
            found += estimate.k
            for line in told(estimate):
                say(f"{here.encoder}: {line}")
    return int(distributed.broadcast(found)), estimate


def told(estimate: Estimate) -> Iterator[str]:
    """The estimate in words, and what speaks against it."""
    if estimate.reason:
        yield f"one cluster: {estimate.reason}"
        return
    low, high = estimate.interval
    others = ", ".join(str(candidate.k) for candidate in estimate.runners_up)
    yield (
        f"{estimate.k} clusters, by {estimate.sure:.0%} of the subsamples ({low} to {high} by all)"
        + (f"; next best: {others}" if others else "")
    )
    if estimate.edge:
        word = "fewest" if estimate.edge == "least" else "most"
        yield (
            f"{estimate.k} is the {word} that is considered (cluster.how_many.{estimate.edge}): there may be "
            f"{'fewer' if estimate.edge == 'least' else 'more'}"
        )
