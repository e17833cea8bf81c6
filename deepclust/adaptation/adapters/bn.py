"""BN: Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift (arXiv 2006.10963).

BatchNorm normalises with the statistics of the batch at hand in place of the training data's. Nothing is learnt, and no
batch depends on the ones before it. With a prior N (arXiv 2006.16971) the training data's count as much as N images
beside the batch's, for small batches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from deepclust.adaptation.base import Adapter, Predict
from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.normalisation import (
    batch_norms,
    blend_statistics,
    check_batch_statistics,
    check_trained_statistics,
    has_batch_norm,
    use_batch_statistics,
)
from deepclust.errors import AdaptationError


def configure_model(model: Classifier, *, prior: float) -> Classifier:
    """Batch statistics in BatchNorm, with a prior if there is one, eval mode elsewhere, without gradients. In place."""
    if prior:
        blend_statistics(model, prior)
    else:
        use_batch_statistics(model)
    return model.requires_grad_(False)


def check_model(model: Classifier, *, prior: float) -> None:
    """Check that the model has the statistics that BN replaces.

    Raises:
        AdaptationError: If it has no BatchNorm, or one that never saw data, or none to give the prior's weight to.
    """
    if not has_batch_norm(model):
        raise AdaptationError(
            "bn needs BatchNorm layers, whose statistics it replaces, and this model has none; use the source adapter"
        )
    check_trained_statistics(model)
    if prior and any(norm.running_mean is None for norm in batch_norms(model)):
        raise AdaptationError(
            f"a prior of {prior} images weighs BatchNorm's running statistics, and this model keeps none in some "
            "layers (track_running_stats=False); use prior 0"
        )


class BN(Adapter):
    """Predicts with batch statistics.

    Args:
        model: The source model; copied.
        prior: How many images the running statistics count for: 0 forgets them, and then a batch needs two images.
        episodic: As for all adapters; no batch depends on another anyway.
        predict: As for all adapters; nothing is learnt, so both are the same.

    Raises:
        AdaptationError: If the model has no BatchNorm, or one that never saw data, or the prior is out of range.
    """

    name = "bn"

    def __init__(
        self, model: nn.Module, *, prior: float = 0.0, episodic: bool = False, predict: Predict = "before"
    ) -> None:
        if not 0 <= prior < math.inf:
            raise AdaptationError(f"expected a finite prior of at least 0 images, got {prior}")
        self.prior = prior
        super().__init__(model, episodic=episodic, predict=predict)

    def _check_model(self, model: Classifier) -> None:
        check_model(model, prior=self.prior)

    def _check_batch(self, images: Tensor) -> None:
        if not self.prior:
            check_batch_statistics(images, self.model)

    def _configure(self, model: Classifier) -> Classifier:
        return configure_model(model, prior=self.prior)

    @torch.no_grad()
    def _adapt(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits
