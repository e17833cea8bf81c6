"""What is measured during training and only logged: rates, losses and kNN on the held-out labels.

It changes nothing that training reads, neither weights nor statistics nor random state, and no output depends on it.
That is why `tasks/pretrain/__main__.py` may call it although pretraining sees no labels.
"""

from __future__ import annotations

import numpy as np
import torch

from deepclust import seeding
from deepclust.evaluation import probing
from deepclust.models import encoder, features
from deepclust.training import loop
from tasks.shared.operations import tracking
from tasks.shared.operations.text import say
from tasks.shared.outputs import prepared

BANK = 5000
QUERIES = 1000
NEIGHBOURS = 20
TEMPERATURE = 0.07
SHOWN = ("loss", "embedding_spread", "prototypes_used", "rankme", "knn_heldout", "images_per_second")  # in the terminal


class Probe:
    """Logs one row of metrics an epoch.

    kNN (k 20, τ .07) of a seeded sample of held-out images against a seeded sample of the other labelled training
    images. Without labels there is no kNN.

    Args:
        run: Where to log.
        name: Of the encoder.
        watched: The encoder in training.
        device: Of the encoder.
    """

    def __init__(self, run: tracking.Run, name: str, watched: encoder.Encoder, device: torch.device) -> None:
        self._run = run
        self._watched = watched
        self._device = device
        self._images = prepared.images("train", name)
        self._labels = prepared.labels("train")
        heldout = prepared.heldout()
        labelled = np.setdiff1d(np.flatnonzero(self._labels >= 0), heldout)
        self._bank = _sample(labelled, BANK)
        self._queries = _sample(heldout, QUERIES)

    def __call__(self, done: loop.Epoch, means: dict[str, float]) -> dict[str, float]:
        """Log an epoch with the means over its steps; returns what was logged."""
        values = means | {
            "images_per_second": done.images / done.seconds,
            "data_share": done.waiting_seconds / done.seconds,
        }
        if len(self._bank) and len(self._queries) and not values.get("non_finite_features"):
            values["knn_heldout"] = self._accuracy()
        self._run.log_metrics(values, step=done.epoch + 1)
        numbers = ", ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)
        say(f"epoch {done.epoch + 1}: {numbers}")
        return values

    def _accuracy(self) -> float:
        training_mode = self._watched.training
        self._watched.eval()
        bank, queries = (
            torch.from_numpy(
                features.extract(self._watched, self._images[indices], batch_size=500, device=self._device)
            )
            for indices in (self._bank, self._queries)
        )
        self._watched.train(training_mode)
        predicted = probing.knn(
            bank,
            torch.from_numpy(self._labels[self._bank]),
            queries,
            classes=int(self._labels.max()) + 1,
            neighbours=[NEIGHBOURS],
            temperatures=[TEMPERATURE],
        )[NEIGHBOURS, TEMPERATURE]
        return float((predicted.numpy() == self._labels[self._queries]).mean())


def _sample(indices: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the indices, always the same ones, in order."""
    order = torch.randperm(len(indices), generator=seeding.generator("probe")).numpy()[:count]
    return np.sort(indices[order])
