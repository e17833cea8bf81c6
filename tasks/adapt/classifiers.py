"""The classifiers of an encoder that are shown shifted images.

linear      the encoder and the classifier of the stage `linear`
fine_tuned  the same after training the whole network on the labelled training images
clusters    the encoder and the clusters of the stage `cluster`: no label is needed, a class is a cluster. Of centroids
            the logits are -‖z - c‖² / m, where m is the mean of training images' squared distances to their centroids;
            a linear head is itself; of what is neither there is none. Nothing is rejected
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import bundle, seeding
from deepclust.adaptation import Classifier, fine_tuning
from deepclust.clustering import clusters
from deepclust.clustering.assigners import Centroids, Layers
from deepclust.clustering.clusters import Clusters
from deepclust.errors import CheckpointError
from deepclust.models import encoder as encoders
from deepclust.models.devices import default_device
from tasks.shared.operations.params import schema
from tasks.shared.outputs import layout, prepared


class Found(NamedTuple):
    """A classifier, in eval mode on the device, and the names of its classes; or why there is none."""

    model: Classifier | None
    names: list[str]
    reason: str = ""


def build(kind: str, encoder: str, values: schema.Params, source_images: Sequence[Tensor]) -> Found:
    """Load or train a classifier.

    Args:
        kind: See the head of this file.
        encoder: Name of the encoder.
        values: All parameters.
        source_images: Batches (B, C, H, W) in [0, 1] of training images, without their labels, on the device.

    Raises:
        CheckpointError: If a stage's output is missing, damaged, or was made for other features.
        TrainingError: If fine-tuning diverges.
    """
    network = encoders.load(layout.out("pretrain", encoder))
    if kind == "clusters":
        return _of_clusters(clusters.load(layout.out("cluster", encoder), network.feature_dim), network, source_images)
    folder = layout.out("linear", encoder)
    if not (folder / bundle.CLASSIFIER).exists():
        raise CheckpointError(f"expected a classifier in {folder}, found none; run its linear stage")
    linear = bundle.load_classifier(folder, network.feature_dim)
    if linear is None:
        return Found(None, [], "no labelled training images, so there is no classifier")
    if len(linear.classes) < 2:
        return Found(None, [], "a single class, which no classifier can get wrong")
    model = _placed(Classifier(network, _linear(linear.weight, linear.bias)))
    if kind == "fine_tuned":
        if not any(parameter.numel() for parameter in network.parameters()):
            return Found(None, [], "the encoder has no parameters to fine-tune")
        options = values.adapt.fine_tune()
        with seeding.seeded("fine-tune", values.seed, "network"):  # dropout, where a backbone has it
            fine_tuning.fine_tune(
                model,
                prepared.images("train", encoder),
                prepared.labels("train"),
                options,
                generator=seeding.generator("fine-tune", values.seed),
                device=default_device(),
            )
    return Found(model, linear.classes)


def _of_clusters(found: Clusters, network: nn.Module, source_images: Sequence[Tensor]) -> Found:
    names, assigner = [str(number) for number in range(found.k)], found.assigner
    if len(names) < 2:
        return Found(None, [], "a single cluster, which no classifier can get wrong")
    if isinstance(assigner, Layers) and len(assigner.layers) == 1:
        unit = found.normalise or assigner.unit
        return Found(_placed(Classifier(_Unit(network) if unit else network, _linear(*assigner.layers[0]))), names)
    if not isinstance(assigner, Centroids):
        return Found(None, [], f"the clusters of {found.algorithm} are neither centroids nor a linear head")
    centroids = assigner.centroids
    model = _placed(Classifier(_Unit(network) if found.normalise else network, _linear(centroids, centroids[:, 0])))
    with torch.no_grad():
        features = torch.cat([model.featurizer(images) for images in source_images])
    model.head.load_state_dict(nearest_centroid(centroids, features.cpu()).state_dict())
    return Found(model, names)


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
