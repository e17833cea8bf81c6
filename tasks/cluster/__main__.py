"""Clusters of one encoder's embeddings: fitted on train, applied to train and test, scored on test.

python -m tasks.cluster swav

If there are several processes, k-means fits on a share of the embeddings in each; the main one does all else.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust import distributed
from deepclust.clustering import confidence, kmeans
from deepclust.clustering.base import Points
from deepclust.clustering.how_many import Estimate
from deepclust.models.devices import default_device
from tasks.cluster import counting, fitting, inspecting, prototypes, writing
from tasks.cluster.scoring import Scorer
from tasks.shared.operations.params import schema
from tasks.shared.operations.text import say, warn
from tasks.shared.outputs import layout, prepared, stage

_REFITS = 4  # that are kept with the clusters, and asked about every image


def main() -> None:
    """Run the stage."""
    with stage.running("cluster") as here:
        assert here.encoder
        options, seed = here.params.cluster, here.params.seed
        features = {split: torch.from_numpy(rows) for split, rows in prepared.embeddings(here.encoder).items()}
        points = {split: _points(rows, options) for split, rows in features.items()}
        _say_what_searches(options, here.encoder)
        everything, inspected = Points(points["train"]), None
        with distributed.by_main() as main:
            if main:
                inspected = inspecting.inspect(here, everything, points["test"])
        kept = _kept(inspected, len(everything), options)
        fitted_on = everything if kept is None else Points(everything.features[kept])
        k, estimate = counting.wanted(here, fitted_on)
        chosen = {name: options.algorithm(name) for name in options.algorithms}
        fits = fitting.fit(fitted_on, points["train"], k, chosen, seeds=options.seeds, seed=seed)
        with distributed.by_main():
            if inspected is not None:  # which it is on the main process
                _report(here, fits, k, estimate, features, points, inspected)


def _points(features: Tensor, options: schema.Cluster) -> Tensor:
    return (F.normalize(features, dim=1) if options.normalise else features).to(default_device())


def _say_what_searches(options: schema.Cluster, encoder: str) -> None:
    engine, device = options.algorithm("kmeans").engine, default_device()  # type: ignore[attr-defined]
    if kmeans.engine_used(engine, device) != engine:
        where = "" if device.type == "cpu" else f" for {device.type}"
        say(f"{encoder}: faiss is not installed{where}, nearest centroids by torch")


def _kept(inspected: inspecting.Inspected | None, count: int, options: schema.Cluster) -> Tensor | None:
    """The training images to fit on, on every process; None for all."""
    if options.duplicates == "keep":
        return None
    mask = torch.zeros(count, dtype=torch.uint8)
    if inspected is not None:
        mask[torch.from_numpy(inspected.copies.kept())] = 1
    return distributed.broadcast(mask.to(default_device())).nonzero().flatten()


def _report(
    here: stage.Here,
    fits: dict[str, list[fitting.Fit]],
    k: int,
    estimate: Estimate | None,
    features: dict[str, Tensor],
    points: dict[str, Tensor],
    inspected: inspecting.Inspected,
) -> None:
    """Scores of every algorithm, the choice among them; the chosen one's tables and pictures."""
    assert here.encoder
    options, seed = here.params.cluster, here.params.seed
    splits = {split: prepared.load(split, here.encoder) for split in layout.SPLITS}
    scorer = Scorer(points["test"], splits["test"].labels, silhouette_images=options.silhouette_images, seed=seed)
    scores, told = {}, {}
    for name, found in fits.items():
        scores[name] = scorer.mean([fit.assigner.assign(points["test"]).cpu().numpy() for fit in found])
        told[name] = fitting.information(found, inspected.graph)
        scores[name]["information"] = told[name]
        numbers = [f"{key} {value['mean']:.3f}" for key, value in scores[name].items()]
        say(f"{here.encoder}: {name}, k = {found[0].assigner.k}: {', '.join(numbers)}")
    primary = options.primary
    if primary == "auto":
        primary = max(told, key=lambda name: round(told[name]["mean"], 6))
        if len(told) > 1:
            say(f"{here.encoder}: {primary} is used, its clusters are told best by neighbours (no label is used)")
    first = fitting.typical(fits[primary])
    refits = [fit.assigner for number, fit in enumerate(fits[primary]) if number != first]
    clusters, judged = confidence.fit(
        fits[primary][first].assigner,
        points["train"],
        refits=refits[:_REFITS],
        normalise=options.normalise,
        algorithm=primary,
        reject=options.reject,
    )
    used = len(np.unique(fits[primary][first].clusters))
    if used < clusters.k or clusters.k != k:
        say(f"{here.encoder}: {primary} made {used} clusters with images, where {k} were asked for")
    own = prototypes.Prototypes(here.encoder, default_device())
    assigned = {split: own.assign(features[split]) for split in layout.SPLITS}
    written = writing.write(here, clusters, judged, points, splits, inspected, estimate)
    here.metrics(
        {
            "k": clusters.k,
            "algorithm": primary,
            **scores[primary],
            "algorithms": scores,
            **written,
            "inspection": inspected.metrics(),
            "prototypes": own.score(assigned, splits),
        }
    )
    if table := prototypes.rows(assigned, splits):
        stage.write_text(here.folder / "prototypes.csv", stage.table(table, prototypes.COLUMNS))
    if leak := inspected.leak():
        warn(f"{here.encoder}: {leak}")


if __name__ == "__main__":
    main()
