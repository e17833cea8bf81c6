"""Tent: Fully Test-Time Adaptation by Entropy Minimization (arXiv 2006.10726, ICLR 2021).

Each batch, one step on the mean entropy of its own predictions, by scale and shift of the normalisations; BatchNorm
normalises with the batch's statistics. Deliberately different: LayerNorm, GroupNorm and InstanceNorm count as affine
too, so that transformers can be adapted; dropout stays off; other parameters can be chosen.

Shapes: B images, C classes.
"""

from __future__ import annotations

from torch import Tensor

from deepclust.adaptation.base import Learner, LearnerConfig
from deepclust.config import Positive, config


@config
class Config(LearnerConfig):
    """Tent's options."""

    rate: Positive = 1e-3
    """Adam's rate; the paper's is 1e-3 at batch 128 or 200 (its CIFAR experiments)."""


def entropy(logits_BC: Tensor) -> Tensor:
    """Entropy (B,) in nats of the softmax of logits."""
    log_p_BC = logits_BC.log_softmax(dim=1)
    return -(log_p_BC.exp() * log_p_BC).sum(dim=1)


class Tent(Learner):
    """Makes its predictions more certain."""

    name = "tent"
    config_class = Config

    def _loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits_BC: Tensor = self.model(images)
        return logits_BC, entropy(logits_BC).mean()
