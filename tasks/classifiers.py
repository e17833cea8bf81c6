"""The classifiers of an encoder that meet shifted images.

linear      the encoder and the classifier of the stage `linear`
fine_tuned  that, then the whole network trained on the labelled training images
clusters    the encoder and the nearest centroid of the stage `cluster`: no label is needed, a class is a cluster.
            Its logits are -‖z - c‖² / m, where m is the mean of training images' squared distances to their centroids
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from deepclust import encoder as encoders
from deepclust import seeding
from deepclust.adaptation import Classifier
from deepclust.devices import default_device
from deepclust.errors import CheckpointError
from deepclust.fine_tuning import fine_tune
from tasks import layout, prepared, sections


@dataclass(frozen=True)
class Found:
    """A classifier, or why there is none.

    Attributes:
        model: In eval mode on the device; None if there is none.
        names: Of its classes.
        reason: Why there is none.
    """

    model: Classifier | None
    names: list[str]
    reason: str = ""


def build(kind: str, encoder: str, values: sections.Params, source_images: Sequence[Tensor]) -> Found:
    """Load or train a classifier.

    Args:
        kind: See the head of this file.
        encoder: Name of the encoder.
        values: All parameters.
        source_images: Batches (B, C, H, W) in [0, 1] of training images, without their labels, on the device.

    Raises:
        CheckpointError: If a stage's output is missing, damaged, or was made for other features.
        TrainingError: If fine-tuning goes wrong.
    """
    network = encoders.load(layout.out("pretrain", encoder))
    if kind == "clusters":
        centroids, normalise = load_centroids(layout.out("cluster", encoder), network.feature_dim)
        model = _placed(Classifier(_Unit(network) if normalise else network, _linear(centroids, centroids[:, 0])))
        with torch.no_grad():
            features = torch.cat([model.featurizer(images) for images in source_images])
        head = nearest_centroid(centroids, features.cpu())
        model.head.load_state_dict(head.state_dict())
        return Found(model, [str(number) for number in range(len(centroids))])
    head_or_none, names = load_head(layout.out("linear", encoder), network.feature_dim)
    if head_or_none is None:
        return Found(None, [], "no labelled training images, so there is no classifier")
    if head_or_none.out_features < 2:
        return Found(None, [], "a single class, which no classifier can get wrong")
    model = _placed(Classifier(network, head_or_none))
    if kind == "fine_tuned":
        if not any(parameter.numel() for parameter in network.parameters()):
            return Found(None, [], "the encoder has no parameters to fine-tune")
        options = values.adapt.fine_tune
        with seeding.seeded("fine-tune", values.seed, "network"):  # dropout, where a backbone has it
            fine_tune(
                model,
                prepared.images("train"),
                prepared.labels("train"),
                epochs=options.epochs,
                batch_size=options.batch_size,
                rate=options.rate,
                generator=seeding.generator("fine-tune", values.seed),
                device=default_device(),
            )
    return Found(model, names)


def load_head(folder: Path, feature_dim: int) -> tuple[nn.Linear | None, list[str]]:
    """The linear classifier of the stage `linear` and its classes, or None if that stage had no labels.

    Raises:
        CheckpointError: If it is missing, damaged, or was made for other features.
    """
    try:
        description = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "classifier.safetensors") if description["classes"] else None
        if weights is None:
            return None, []
        weight, bias = weights["weight"], weights["bias"]
    except FileNotFoundError as error:
        raise CheckpointError(f"expected a classifier in {folder}, found none; run its linear stage") from error
    except Exception as error:  # safetensors raises its own, undocumented types on damaged files
        raise CheckpointError(f"the classifier in {folder} is damaged ({error}); run its linear stage again") from error
    expected = (len(description["classes"]), feature_dim)
    if weight.shape != expected or bias.shape != expected[:1]:
        raise CheckpointError(
            f"expected a classifier {expected} (classes, features) in {folder}, got {tuple(weight.shape)} and bias "
            f"{tuple(bias.shape)}; run its embed and linear stages again"
        )
    return _linear(weight, bias), description["classes"]


def load_centroids(folder: Path, feature_dim: int) -> tuple[Tensor, bool]:
    """The centroids (K, D) of the stage `cluster`, and whether they are those of features of unit length.

    Raises:
        CheckpointError: If they are missing, damaged, or were made for other features.
    """
    try:
        centroids = torch.from_numpy(np.load(folder / "centroids.npy", allow_pickle=False)).float()
        description: dict[str, Any] = json.loads((folder / "cluster.json").read_text(encoding="utf-8"))
        normalise = bool(description["normalise"])
    except FileNotFoundError as error:
        raise CheckpointError(f"expected centroids in {folder}, found none; run its cluster stage") from error
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"the centroids in {folder} are damaged ({error}); run its cluster stage again"
        ) from error
    if centroids.ndim != 2 or centroids.shape[1] != feature_dim:
        raise CheckpointError(
            f"expected centroids (clusters, {feature_dim}) in {folder}, got {tuple(centroids.shape)}; run its embed "
            "and cluster stages again"
        )
    return centroids, normalise


def nearest_centroid(centroids_KD: Tensor, features_ND: Tensor) -> nn.Linear:
    """The nearest centroid as a linear head: its logits are -‖z - c‖² / m, up to what all clusters share.

    m is the mean squared distance of the given features to their nearest centroid, so the probabilities do not depend
    on the features' scale; a fixed m would saturate or flatten them. Where every feature is a centroid, m is 1.
    """
    exact = "donot_use_mm_for_euclid_dist"  # an expanded square would cancel
    distances_NK = torch.cdist(features_ND.double(), centroids_KD.double(), compute_mode=exact)
    mean = distances_NK.amin(dim=1).square().mean().item() or 1.0
    return _linear(2 * centroids_KD / mean, -centroids_KD.square().sum(dim=1) / mean)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], len(weight))
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


def _placed(model: Classifier) -> Classifier:
    """On the device and in eval mode; channels-last convolutions are up to three times as fast on a CPU."""
    placed = model.to(default_device()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert isinstance(placed, Classifier)
    return placed.eval().requires_grad_(False)


class _Unit(nn.Module):
    """An encoder whose features have length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.encoder(images), dim=1)
