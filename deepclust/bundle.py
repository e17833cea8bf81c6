"""An encoder with its clusters and, where there is one, its classifier: all that assigns new images.

    bundle = load(folder)
    assigned = bundle.assign(images)

A bundle is a folder of safetensors, npy and JSON, of which nothing is unpickled. The pipeline keeps its parts in the
folders of several stages, which `load` takes one by one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deepclust import files
from deepclust.clustering import clusters as clustering
from deepclust.clustering.clusters import Clusters
from deepclust.config import as_dict
from deepclust.errors import CheckpointError, ConfigError
from deepclust.images.reading import Reading
from deepclust.models import encoder, features, weights
from deepclust.models.devices import default_device

WEIGHTS, CLASSIFIER = "classifier.safetensors", "classifier.json"
STATISTICS = "statistics.json"


class Classifier(NamedTuple):
    """A linear classifier on the features.

    Attributes:
        classes: Names, in the order of the outputs.
        weight: (C, D) float32.
        bias: (C,) float32.
    """

    classes: list[str]
    weight: Tensor
    bias: Tensor


class Assigned(NamedTuple):
    """Clusters and classes of N images.

    Attributes:
        features: (N, D) float32.
        clusters: (N,) int64, -1 of images that the clusters reject.
        distances: (N,) float32, Euclidean distance to the centroid, where rejected of the cluster it would have been.
        confidences: (N,) float32 from 0 to 1, what decides on rejection.
        probabilities: (N, C) float32, or None without a classifier.
    """

    features: NDArray[np.float32]
    clusters: NDArray[np.int64]
    distances: NDArray[np.float32]
    confidences: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Everything that assigns new images.

    Attributes:
        encoder: In eval mode, on its device.
        clusters: Of the encoder's features.
        classifier: Of the encoder's features, or None.
        reading: How the training images' files became pixels.
    """

    encoder: encoder.Encoder
    clusters: Clusters
    classifier: Classifier | None
    reading: Reading

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return int(self.encoder.description["image_size"])

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return int(self.encoder.description["channels"])

    @property
    def classes(self) -> list[str]:
        """Names of the classifier's outputs; empty without a classifier."""
        return self.classifier.classes if self.classifier else []

    def assign(self, images: NDArray[np.uint8], *, batch_size: int = 256) -> Assigned:
        """Embed images, find their clusters and, where there is a classifier, their classes.

        Args:
            images: (N, H, W, C) uint8, of the encoder's size and channels.
            batch_size: Images that are embedded at once.
        """
        device = self.encoder.mean.device
        embedded = features.extract(self.encoder, images, batch_size=batch_size, device=device)
        points = torch.from_numpy(embedded)
        judged = self.clusters.judge(self.clusters.points(points))
        probabilities = None
        if self.classifier:
            probabilities = F.linear(points, self.classifier.weight, self.classifier.bias).softmax(dim=1).numpy()
        clusters, distances, scores = self.clusters.kept(judged), judged.distances, judged.scores
        return Assigned(embedded, clusters.numpy(), distances.numpy(), scores.numpy(), probabilities)

    def save(self, folder: Path) -> None:
        """Write the bundle into an existing folder."""
        encoder.save(self.encoder, folder)
        self.clusters.save(folder)
        _write(folder / CLASSIFIER, {"classes": self.classes})
        if self.classifier:
            weights.save({"weight": self.classifier.weight, "bias": self.classifier.bias}, folder / WEIGHTS)
        _write(folder / STATISTICS, as_dict(self.reading))


def load(
    folder: Path,
    *,
    clusters: Path | None = None,
    classifier: Path | None = None,
    statistics: Path | None = None,
    device: torch.device | None = None,
) -> Bundle:
    """Read a bundle.

    Args:
        folder: Where it was saved, or the encoder's folder where the other parts lie elsewhere.
        clusters: Folder of the clusters.
        classifier: Folder of the classifier; it may have none.
        statistics: File of the description of the training images.
        device: Where the encoder computes; the best there is by default.

    Raises:
        CheckpointError: If encoder, clusters or description are missing or damaged, or do not belong together.
    """
    trained = encoder.load(folder)
    found = clustering.load(clusters or folder, trained.feature_dim)
    return Bundle(
        encoder=trained.to(device or default_device()),
        clusters=found,
        classifier=load_classifier(classifier or folder, trained.feature_dim),
        reading=load_reading(statistics or folder / STATISTICS, trained.description),
    )


def load_classifier(folder: Path, feature_dim: int) -> Classifier | None:
    """Read a classifier; None where the data had no labels, or nothing was classified yet.

    Raises:
        CheckpointError: If it is damaged, or was made for features of another dimension.
    """
    if not (folder / CLASSIFIER).exists():
        return None
    try:
        classes: list[str] = files.record(folder / CLASSIFIER, {"classes": list[str]})["classes"]
        tensors = weights.load(folder / WEIGHTS) if classes else None
    except CheckpointError as error:
        raise CheckpointError(f"{error}; run its linear stage") from error
    if tensors is None:
        return None
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != {
        "weight": ((len(classes), feature_dim), torch.float32),
        "bias": ((len(classes),), torch.float32),
    }:
        shapes = ", ".join(f"{name} {shape} {str(dtype)[6:]}" for name, (shape, dtype) in sorted(found.items()))
        raise CheckpointError(
            f"expected a float32 classifier ({len(classes)} classes, {feature_dim} features) in {folder / WEIGHTS}, "
            f"got {shapes}; it belongs to another encoder: run its embed and linear stages again"
        )
    return Classifier(classes, tensors["weight"], tensors["bias"])


def load_reading(path: Path, description: Mapping[str, Any]) -> Reading:
    """Read how files became pixels.

    Args:
        path: A description of the training images; their size and channels may be missing.
        description: Of the encoder, whose size and channels they must have.

    Raises:
        CheckpointError: If it is missing or damaged, or of other images than the encoder's.
    """
    shape = {name: Literal[description[name]] for name in ("image_size", "channels")}
    try:
        return Reading.of(files.record(path, {"resize": str}, shape))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; run prepare") from error
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged: {error}; run prepare") from error


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
