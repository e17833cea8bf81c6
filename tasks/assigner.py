"""A trained encoder with its clusters and, where there is one, its classifier, applied to images in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from deepclust import encoder, features
from deepclust.devices import default_device
from deepclust.errors import CheckpointError
from tasks import decode, layout, prepared


@dataclass(frozen=True)
class Model:
    """Everything that assigns.

    Attributes:
        encoder: In eval mode, on its device.
        centroids: (K, D) float32.
        normalise: Whether features are brought to unit length before they are compared with centroids.
        classes: Names of the classifier's outputs; empty without a classifier.
        weight: (classes, D), or None.
        bias: (classes,), or None.
        resize: How the training images were made square.
    """

    encoder: encoder.Encoder
    centroids: Tensor
    normalise: bool
    classes: list[str]
    weight: Tensor | None
    bias: Tensor | None
    resize: decode.Resize

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return int(self.encoder.description["image_size"])

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return int(self.encoder.description["channels"])

    @property
    def dim(self) -> int:
        """Dimension of the features."""
        return self.encoder.feature_dim

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.centroids)

    def assign(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
        """Embed images and find their clusters.

        Args:
            images: (N, H, W, C) uint8.

        Returns:
            Features (N, D), and for each image `cluster`, `distance` (Euclidean, to the centroid) and, where there is a
            classifier, `class` and its `probability`.
        """
        embedded = features.extract(self.encoder, images, batch_size=len(images), device=default_device())
        points = torch.from_numpy(embedded)
        compared = F.normalize(points, dim=1) if self.normalise else points
        # In float64 the direct formula: the expanded one loses the distances of images close to their centroid.
        distances, clusters = torch.cdist(
            compared.double(), self.centroids.double(), compute_mode="donot_use_mm_for_euclid_dist"
        ).min(dim=1)
        rows: list[dict[str, Any]] = [
            {"cluster": cluster, "distance": f"{distance:.6g}"}
            for cluster, distance in zip(clusters.tolist(), distances.tolist(), strict=True)
        ]
        if self.weight is not None:
            best, numbers = F.linear(points, self.weight, self.bias).softmax(dim=1).max(dim=1)
            for row, probability, number in zip(rows, best.tolist(), numbers.tolist(), strict=True):
                row |= {"class": self.classes[number], "probability": f"{probability:.6g}"}
        return embedded, rows


def load(name: str) -> Model:
    """The encoder of that name with what the later stages made of it.

    Raises:
        CheckpointError: If encoder or clusters are missing or damaged, or do not belong together.
        DataError: If the prepared data's description is missing.
    """
    trained = encoder.load(layout.out("pretrain", name))
    folder = layout.out("cluster", name)
    try:
        centroids = torch.from_numpy(np.load(folder / "centroids.npy", allow_pickle=False))
        normalise = bool(json.loads((folder / "cluster.json").read_text(encoding="utf-8"))["normalise"])
    except FileNotFoundError as error:
        raise CheckpointError(f"expected clusters in {folder}, found none; run `dvc repro cluster@{name}`") from error
    except (ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"the clusters in {folder} are damaged ({error}); run its cluster stage again") from error
    if centroids.ndim != 2 or centroids.shape[1] != trained.feature_dim:
        raise CheckpointError(
            f"expected centroids of {trained.feature_dim} dimensions in {folder}, got the shape "
            f"{tuple(centroids.shape)}; they belong to another encoder: run its cluster stage again"
        )
    classes, weight, bias = _classifier(layout.out("linear", name), trained.feature_dim)
    return Model(
        encoder=trained.to(default_device()),
        centroids=centroids,
        normalise=normalise,
        classes=classes,
        weight=weight,
        bias=bias,
        resize=prepared.statistics()["resize"],
    )


def _classifier(folder: Path, dim: int) -> tuple[list[str], Tensor | None, Tensor | None]:
    """Class names, weight and bias; nothing where the data had no labels or the stage has not run."""
    if not (folder / "classifier.safetensors").exists():
        return [], None, None
    try:
        classes = list(json.loads((folder / "classifier.json").read_text(encoding="utf-8"))["classes"])
        tensors = load_file(folder / "classifier.safetensors")
        weight, bias = tensors["weight"], tensors["bias"]
    except Exception as error:  # safetensors raises its own, undocumented types on damaged files
        raise CheckpointError(f"the classifier in {folder} is damaged ({error}); run its linear stage again") from error
    if weight.shape != (len(classes), dim) or bias.shape != (len(classes),):
        raise CheckpointError(
            f"expected a classifier of {len(classes)} classes and {dim} dimensions in {folder}, got "
            f"{tuple(weight.shape)}; it belongs to another encoder: run its linear stage again"
        )
    return classes, weight, bias
