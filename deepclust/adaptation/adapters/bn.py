"""BN: Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift (arXiv 2006.10963).

BatchNorm normalises with the statistics of the batch at hand in place of the training data's. Nothing is learnt, and no
batch depends on the ones before it. With a prior N (arXiv 2006.16971) the training data's count as much as N images
beside the batch's, for small batches.
"""

from __future__ import annotations

from torch import Tensor

from deepclust.adaptation.base import BATCH_STATISTICS, Adapter, AdapterConfig
from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.normalisation import (
    batch_norms,
    blend_statistics,
    check_batch_statistics,
    check_trained_statistics,
    use_batch_statistics,
)
from deepclust.config import NotNegative, config
from deepclust.errors import AdaptationError


@config
class Config(AdapterConfig):
    """BN's options."""

    prior: NotNegative = 0.0
    """How many images the running statistics count for: 0 forgets them, and then a batch needs two images."""

    @property
    def passes(self) -> float:
        """As of every adapter."""
        return BATCH_STATISTICS


class BN(Adapter):
    """Predicts with batch statistics; nothing is learnt, so before and after, episodic or not, are the same."""

    name = "bn"
    config_class = Config
    config: Config

    def _check_model(self, model: Classifier) -> None:
        norms, prior = batch_norms(model), self.config.prior
        if not norms:
            raise AdaptationError(
                "bn needs BatchNorm layers, whose statistics it replaces, and this model has none; use the source "
                "adapter"
            )
        check_trained_statistics(model)
        if prior and any(norm.running_mean is None for norm in norms):
            raise AdaptationError(
                f"a prior of {prior} images weighs BatchNorm's running statistics, and this model keeps none in some "
                "layers (track_running_stats=False); use prior 0"
            )

    def _check_batch(self, images: Tensor) -> None:
        if not self.config.prior:
            check_batch_statistics(images, self.model)

    def _configure(self, model: Classifier) -> Classifier:
        if self.config.prior:
            blend_statistics(model, self.config.prior)
        else:
            use_batch_statistics(model)
        return model.requires_grad_(False)
