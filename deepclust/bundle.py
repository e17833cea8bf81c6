"""An encoder with its clusters and, where there is one, its classifier: all that assigns new images.

    bundle = load(folder)
    assigned = bundle.assign(images)

A bundle is a folder of safetensors, npy and JSON, of which nothing is unpickled. The pipeline keeps its parts in the
folders of several stages, which `load` takes one by one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepclust.config import as_dict
from deepclust.errors import CheckpointError, ConfigError
from deepclust.images.reading import Reading
from deepclust.models import encoder, features
from deepclust.models.devices import default_device

CENTROIDS, CLUSTERS = "centroids.npy", "cluster.json"
WEIGHTS, CLASSIFIER = "classifier.safetensors", "classifier.json"
STATISTICS = "statistics.json"
_DIRECT = "donot_use_mm_for_euclid_dist"  # the expanded square loses the distances of images close to their centroid


class Clusters(NamedTuple):
    """Centroids, and the features that they are compared with.

    Attributes:
        centroids: (K, D) float32.
        normalise: Whether features are brought to unit length first.
    """

    centroids: Tensor
    normalise: bool


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
        clusters: (N,) int64, the nearest centroid.
        distances: (N,) float32, Euclidean distance to it.
        probabilities: (N, C) float32, or None without a classifier.
    """

    features: NDArray[np.float32]
    clusters: NDArray[np.int64]
    distances: NDArray[np.float32]
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
        compared = F.normalize(points, dim=1) if self.clusters.normalise else points
        nearest = torch.cdist(compared.double(), self.clusters.centroids.double(), compute_mode=_DIRECT).min(dim=1)
        probabilities = None
        if self.classifier:
            probabilities = F.linear(points, self.classifier.weight, self.classifier.bias).softmax(dim=1).numpy()
        return Assigned(embedded, nearest.indices.numpy(), nearest.values.float().numpy(), probabilities)

    def save(self, folder: Path) -> None:
        """Write the bundle into an existing folder."""
        encoder.save(self.encoder, folder)
        np.save(folder / CENTROIDS, self.clusters.centroids.numpy())
        _write(folder / CLUSTERS, {"k": len(self.clusters.centroids), "normalise": self.clusters.normalise})
        _write(folder / CLASSIFIER, {"classes": self.classes})
        if self.classifier:
            save_file({"weight": self.classifier.weight, "bias": self.classifier.bias}, folder / WEIGHTS)
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
        statistics: Folder of the description of the training images.
        device: Where the encoder computes; the best there is by default.

    Raises:
        CheckpointError: If encoder, clusters or description are missing or damaged, or do not belong together.
    """
    trained = encoder.load(folder)
    found = load_clusters(clusters or folder, trained.feature_dim)
    return Bundle(
        encoder=trained.to(device or default_device()),
        clusters=found,
        classifier=load_classifier(classifier or folder, trained.feature_dim),
        reading=_reading((statistics or folder) / STATISTICS),
    )


def load_clusters(folder: Path, feature_dim: int) -> Clusters:
    """Read centroids.

    Raises:
        CheckpointError: If they are missing, damaged, or were made for features of another dimension.
    """
    try:
        centroids = torch.from_numpy(np.load(folder / CENTROIDS, allow_pickle=False)).float()
        normalise = bool(_read(folder / CLUSTERS)["normalise"])
    except FileNotFoundError as error:
        raise CheckpointError(f"expected clusters in {folder}, found none; run its cluster stage") from error
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        raise CheckpointError(f"the clusters in {folder} are damaged ({error}); run its cluster stage again") from error
    if centroids.ndim != 2 or centroids.shape[1] != feature_dim:
        raise CheckpointError(
            f"expected centroids (clusters, {feature_dim}) in {folder}, got {tuple(centroids.shape)}; they belong to "
            "another encoder: run its embed and cluster stages again"
        )
    return Clusters(centroids, normalise)


def load_classifier(folder: Path, feature_dim: int) -> Classifier | None:
    """Read a classifier; None where the data had no labels, or nothing was classified yet.

    Raises:
        CheckpointError: If it is damaged, or was made for features of another dimension.
    """
    try:
        classes = list(_read(folder / CLASSIFIER)["classes"]) if (folder / CLASSIFIER).exists() else []
        if not classes:
            return None
        tensors = load_file(folder / WEIGHTS)
        weight, bias = tensors["weight"], tensors["bias"]
    except Exception as error:  # safetensors raises its own, undocumented types on damaged files
        raise CheckpointError(f"the classifier in {folder} is damaged ({error}); run its linear stage again") from error
    if weight.shape != (len(classes), feature_dim) or bias.shape != (len(classes),):
        raise CheckpointError(
            f"expected a classifier ({len(classes)} classes, {feature_dim} features) in {folder}, got "
            f"{tuple(weight.shape)} and bias {tuple(bias.shape)}; it belongs to another encoder: run its embed and "
            "linear stages again"
        )
    return Classifier(classes, weight, bias)


def _reading(path: Path) -> Reading:
    try:
        return Reading.of(_read(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"expected a description of the images in {path}, found none; run prepare") from error
    except (ValueError, ConfigError) as error:
        raise CheckpointError(
            f"the description of the images in {path} is damaged ({error}); run prepare again"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
