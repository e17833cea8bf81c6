"""kNN and a linear classifier on the frozen embeddings of one encoder.

python -m tasks.linear swav
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.evaluation import probing
from deepclust.models import weights
from deepclust.models.devices import default_device
from tasks.shared.operations.params import schema
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout, prepared, stage

NO_LABELS = "no labelled training images"
NO_TEST_LABELS = "no labelled test images"


def main() -> None:
    """Run the stage."""
    with stage.running("linear") as here:
        assert here.encoder
        labels = {split: prepared.labels(split) for split in layout.SPLITS}
        classes = prepared.meta()["classes"]
        labelled = int((labels["train"] >= 0).sum())
        description: dict[str, Any] = {"classes": classes, "labelled": labelled, "reason": None}
        if not labelled:
            description |= {"classes": [], "reason": NO_LABELS}
            here.metrics({"labelled": 0, "reason": NO_LABELS})
            say(f"{here.encoder}: {NO_LABELS}, nothing to classify")
        else:
            embeddings = {split: torch.from_numpy(rows) for split, rows in prepared.embeddings(here.encoder).items()}
            for k in here.params.linear.neighbours:
                if k > labelled:
                    say(f"{here.encoder}: kNN of {k}: all {labelled} labelled training images vote, there are no more")
            metrics, classifier = evaluate(embeddings, labels, prepared.heldout(), len(classes), here.params.linear)
            here.metrics(metrics)
            parts = {"weight": classifier.weight, "bias": classifier.bias}
            stored = {name: value.cpu().contiguous() for name, value in parts.items()}
            weights.save(stored, here.folder / "classifier.safetensors")
            numbers = [f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, float)]
            say(f"{here.encoder}: {', '.join(numbers)}")
        stage.write_text(here.folder / "classifier.json", stage.json_text(description))


def evaluate(
    embeddings: dict[str, Tensor],
    labels: dict[str, np.ndarray],
    heldout: np.ndarray,
    classes: int,
    options: schema.Linear,
) -> tuple[dict[str, Any], probing.LinearClassifier]:
    """kNN and linear accuracy on the held-out training images and on the test images.

    The weight decay is chosen on the held-out images; with it, the classifier that is tested and kept is fitted on all
    labelled training images.

    Args:
        embeddings: Of `train` (N, D) and `test` (M, D).
        labels: Of both, -1 where unknown.
        heldout: Indices of the held-out training images; may be empty.
        classes: Number of classes.
        options: Parameters of the stage.

    Returns:
        The stage's metrics, and the classifier. Without labels, a number is absent.
    """
    device = default_device()
    features = {split: array.to(device) for split, array in embeddings.items()}
    targets = {split: torch.from_numpy(array).to(device) for split, array in labels.items()}
    labelled = torch.from_numpy(np.flatnonzero(labels["train"] >= 0)).to(device)
    fitting = torch.from_numpy(np.setdiff1d(np.flatnonzero(labels["train"] >= 0), heldout)).to(device)
    held = torch.from_numpy(heldout).to(device)
    tested = torch.from_numpy(np.flatnonzero(labels["test"] >= 0)).to(device)
    metrics: dict[str, Any] = {"labelled": len(labelled)}

    def knn(bank: Tensor, queries: Tensor, query_labels: Tensor) -> dict[tuple[int, float], float]:
        predictions = probing.knn(
            features["train"][bank],
            targets["train"][bank],
            queries,
            classes=classes,
            neighbours=options.neighbours,
            temperatures=options.temperatures,
        )
        return {key: _accuracy(predicted, query_labels) for key, predicted in predictions.items()}

    def fit(rows: Tensor, weight_decays: list[float]) -> list[probing.LinearClassifier]:
        return probing.fit_linear(
            features["train"][rows],
            targets["train"][rows],
            classes=classes,
            weight_decays=weight_decays,
            iterations=options.iterations,
        )

    first = (options.neighbours[0], options.temperatures[0])
    decays = list(options.weight_decays)
    best = decays[0]
    if len(held):
        metrics["knn_heldout"] = knn(fitting, features["train"][held], targets["train"][held])[first]
        candidates = fit(fitting, decays)
        accuracies = [_accuracy(c.predict(features["train"][held]), targets["train"][held]) for c in candidates]
        best = decays[int(np.argmax(accuracies))]
        metrics["linear_heldout"] = max(accuracies)
    metrics["weight_decay"] = best
    (classifier,) = fit(labelled, [best])
    if len(tested):
        found = knn(labelled, features["test"][tested], targets["test"][tested])
        metrics["knn"] = found[first]
        metrics["linear"] = _accuracy(classifier.predict(features["test"][tested]), targets["test"][tested])
        metrics["all"] = {f"k{k}_t{temperature:g}": value for (k, temperature), value in found.items()}
    else:
        metrics["reason"] = NO_TEST_LABELS
    return metrics, classifier


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels).double().mean())


if __name__ == "__main__":
    main()
