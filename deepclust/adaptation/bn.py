"""BN: Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift (arXiv 2006.10963).

BatchNorm normalises with the statistics of the batch at hand in place of the training data's. Nothing is learnt, and no
batch depends on the ones before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepclust.adaptation.base import (
    Adapter,
    Classifier,
    check_batch_statistics,
    check_trained_statistics,
    has_batch_norm,
    use_batch_statistics,
)
from deepclust.errors import AdaptationError


def configure_model(model: Classifier) -> Classifier:
    """Batch statistics in BatchNorm, eval mode elsewhere, without gradients. In place."""
    use_batch_statistics(model)
    return model.requires_grad_(False)


def check_model(model: Classifier) -> None:
    """Raises AdaptationError if the model has no BatchNorm, or one that never saw data."""
    if not has_batch_norm(model):
        raise AdaptationError(
            "bn needs BatchNorm layers, whose statistics it replaces, and this model has none; use the source adapter"
        )
    check_trained_statistics(model)


class BN(Adapter):
    """Predicts with batch statistics.

    Args:
        model: The source model; copied.

    Raises:
        AdaptationError: If the model has no BatchNorm, or one that never saw data.
    """

    def __init__(self, model: Classifier) -> None:
        check_model(model)
        super().__init__(model)

    def _configure(self, model: Classifier) -> Classifier:
        return configure_model(model)

    @torch.no_grad()
    def _adapt(self, images: Tensor) -> Tensor:
        check_batch_statistics(images, self.model)
        logits: Tensor = self.model(images)
        return logits
