"""Compare candidates for a recipe on images held out of train; the test images are not looked at.

    python benchmarks/recipes.py pcl --try now --try softer pretrain.pcl.temperature=1.0
    python benchmarks/recipes.py swav --recipe recipes/fashion-mnist-long.yaml --try longer pretrain.swav.epochs=20

A candidate is edits of params.yaml; it is pretrained in a workspace of its own, as `benchmarks/seeds.py` makes them, as
many at once as the flow runs stages. kNN, linear classifier and k-means (mean ± std over k-means seeds) are fitted on
the other training images and scored on the held-out tenth. Pretraining sees the held-out images, without labels, so
the numbers compare candidates and flatter all of them against the test images. `--keep DIR` as there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from seeds import ROOT, cell, run, workspace

from deepclust import seeding
from deepclust.clustering import algorithms
from deepclust.clustering.base import Points, Problem
from deepclust.evaluation import metrics
from tasks.linear import __main__ as linear
from tasks.shared.operations import params
from tasks.shared.outputs import environment, layout

HEADER = "| candidate | seed | kNN | linear | ACC | NMI | seconds |\n|---|---|---|---|---|---|---|"


def score(root: Path, encoder: str) -> list[str]:
    """kNN, linear, ACC and NMI on the held-out images of a workspace.

    Raises:
        SystemExit: If no image is held out, as where there are no labels.
    """
    train = root / layout.split("train")
    features = torch.from_numpy(np.load(root / layout.embeddings(encoder, "train"), allow_pickle=False))
    labels = np.load(train / "labels.npy", allow_pickle=False)
    held = np.load(train / "heldout.npy", allow_pickle=False)
    if not len(held):
        raise SystemExit("error: expected labelled training images to hold some out, got none; label a few")
    options = params.load(root / layout.PARAMS)
    classes = int(labels.max()) + 1
    found, _ = linear.evaluate(
        {"train": features, "test": features[:0]},
        {"train": labels, "test": labels[:0]},
        held,
        classes,
        options.linear,
    )
    if options.cluster.normalise:
        features = F.normalize(features, dim=1)
    others = Points(features[np.setdiff1d(np.arange(len(labels)), held)])
    k = options.cluster.k if isinstance(options.cluster.k, int) else classes
    matched, shared = [], []
    for number in range(options.cluster.seeds):
        problem = Problem(points=others, k=k, seed=seeding.derive(options.seed, "cluster", number))
        fitted = algorithms.fit("kmeans", problem, options.cluster.algorithm("kmeans"))
        clusters = fitted.assign(features[held]).numpy()
        matched.append(metrics.matched_accuracy(labels[held], clusters))
        shared.append(metrics.nmi(labels[held], clusters))
    return [f"{found['knn_heldout']:.3f}", f"{found['linear_heldout']:.3f}", cell(matched), cell(shared)]


def candidate(folder: Path, name: str, edits: list[str], seed: int, recipe: Path | None, encoder: str) -> str:
    """Train and score one candidate with one seed; its row."""
    torch.set_num_threads(environment.threads())
    (folder / name).mkdir(parents=True, exist_ok=True)
    root = workspace(folder / name, seed, recipe, [f"encoders=[{encoder}]", *edits])
    stages = ("sizes", "prepare", "pretrain", "embed")
    taken = {stage: run(root, stage, None if stage in layout.ONCE else encoder) for stage in stages}
    seconds = taken["pretrain"]
    row = f"| {' | '.join([name, str(seed), *score(root, encoder), f'{seconds:.0f}'])} |"
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(prog="python benchmarks/recipes.py", description=__doc__.splitlines()[0])
    parser.add_argument("encoder")
    parser.add_argument("--try", dest="tries", nargs="+", action="append", required=True, metavar="NAME [KEY=VALUE]")
    parser.add_argument("--recipe", type=Path, help="a file of recipes/, applied over params.yaml first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", type=Path, help="a folder for the workspaces; else they are removed")
    arguments = parser.parse_args()
    names = [name for name, *_ in arguments.tries]
    if len(set(names)) < len(names):
        parser.error(f"expected a name of its own for each --try, got {', '.join(names)}")
    if paths := [name for name in names if name in ("", ".", "..") or "/" in name]:
        parser.error(f"expected a name for each --try, got the path {paths[0]!r}")
    environment.prepare()
    os.chdir(ROOT)
    folder = (arguments.keep or Path(tempfile.mkdtemp(prefix="deepclust-recipes-"))).resolve()
    try:
        with ThreadPoolExecutor(environment.parallel()) as pool:
            rows = [
                pool.submit(candidate, folder, name, edits, seed, arguments.recipe, arguments.encoder)
                for name, *edits in arguments.tries
                for seed in arguments.seeds
            ]
            print(HEADER, *(row.result() for row in rows), sep="\n")
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
