"""Clustering algorithms on an encoder's embeddings: accuracy, the label-free choice, the estimate of k, rejection.

python benchmarks/clustering.py WORKSPACE ENCODER [--algorithms kmeans spectral temi] [--seeds 10]

Fitted on the training images with the number of classes as k, scored on the test images. All options have their usual
values, whatever params.yaml of the workspace says.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deepclust import seeding
from deepclust.clustering import algorithms, choice, confidence, how_many
from deepclust.clustering.base import USUAL, Points, Problem
from deepclust.evaluation import metrics
from tasks.shared.outputs import layout


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, help="where prepare and embed have run on labelled images")
    parser.add_argument("encoder")
    parser.add_argument(
        "--algorithms", nargs="+", default=["kmeans", "spectral", "temi"], choices=algorithms.ALGORITHMS
    )
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    features, labels = {}, {}
    for split in layout.SPLITS:
        file = arguments.workspace / layout.embeddings(arguments.encoder, split)
        features[split] = torch.from_numpy(np.load(file, allow_pickle=False))
        labels[split] = np.load(arguments.workspace / layout.split(split) / "labels.npy", allow_pickle=False)
    k = int(labels["train"].max()) + 1
    points = Points(features["train"])
    begin = time.monotonic()
    points.graph(USUAL)
    print(f"{len(points):,} training images, {k} classes; graph of neighbours: {time.monotonic() - begin:.1f} s")
    begin = time.monotonic()
    found = how_many.estimate(points.features, how_many.Config(), seed=0)
    others = [candidate.k for candidate in found.runners_up]
    told = f"estimated k: {found.k} ({found.interval}, sure {found.sure:.0%}), next {others}"
    print(f"{told}; {time.monotonic() - begin:.1f} s")
    for name in arguments.algorithms:
        rows = [_fitted(name, points, features, labels, k, seed) for seed in range(arguments.seeds)]
        means, stds = np.mean(rows, axis=0), np.std(rows, axis=0)
        heads = ("information", "test ACC", "test NMI", "train ACC", "seconds")
        print(f"{name:10}", ", ".join(f"{h} {m:.3f} ± {s:.3f}" for h, m, s in zip(heads, means, stds, strict=True)))
    for name in arguments.algorithms:
        _reject(name, points, features, labels, k)


def _fitted(
    name: str,
    points: Points,
    features: dict[str, torch.Tensor],
    labels: dict[str, NDArray[np.int64]],
    k: int,
    seed: int,
) -> tuple[float, ...]:
    begin = time.monotonic()
    fit = algorithms.fit(name, _problem(points, k, seed), algorithms.config_class(name)())
    seconds = time.monotonic() - begin
    train, test = (fit.assign(features[split]) for split in layout.SPLITS)
    told = choice.information(train, points.graph(USUAL), k)
    scores = [metrics.matched_accuracy, metrics.nmi]
    return (
        told,
        *(score(labels["test"], test.numpy()) for score in scores),
        metrics.matched_accuracy(labels["train"], train.numpy()),
        seconds,
    )


def _problem(points: Points, k: int, seed: int) -> Problem:
    return Problem(points=points, k=k, seed=seeding.derive(0, "cluster", seed))


def _reject(
    name: str, points: Points, features: dict[str, torch.Tensor], labels: dict[str, NDArray[np.int64]], k: int
) -> None:
    """What leaving out the least sure tenth brings, of what leaving out wrong ones alone would."""
    fits = [algorithms.fit(name, _problem(points, k, seed), algorithms.config_class(name)()) for seed in range(5)]
    clusters, _ = confidence.fit(fits[0], points.features, refits=fits[1:], normalise=False, algorithm=name, reject=0.1)
    judged = clusters.judge(features["test"])
    right = confidence.right(labels["test"], judged.clusters.numpy())
    kept = (clusters.kept(judged) >= 0).numpy()
    covered = confidence.covered(right, kept)
    print(f"{name:10} threshold of 10 % of train: {covered}")


if __name__ == "__main__":
    main()
