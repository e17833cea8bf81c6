"""Tent: Fully Test-Time Adaptation by Entropy Minimization (arXiv 2006.10726, ICLR 2021).

Each batch, one step on the mean entropy of its own predictions, by scale and shift of the normalisations; BatchNorm
normalises with the batch's statistics. Deliberately different: LayerNorm, GroupNorm and InstanceNorm count as affine
too, so that transformers can be adapted; dropout stays off; other parameters can be chosen.

Shapes: B images, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepclust.adaptation.base import Learner, LearnerConfig, descend
from deepclust.adaptation.classifier import Classifier
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


def step(images: Tensor, *, model: Classifier, optimizer: torch.optim.Optimizer) -> Tensor:
    """Predict a batch and take one step on the mean entropy. Changes the model through the optimiser.

    Returns:
        Logits (B, C) from before the step.

    Raises:
        AdaptationError: If loss, gradient or logits are not finite; nothing is then changed.
    """
    with torch.enable_grad():
        logits_BC: Tensor = model(images)
        descend(entropy(logits_BC).mean(), logits_BC, optimizer, name="tent")
    return logits_BC.detach()


class Tent(Learner):
    """Makes its predictions more certain."""

    name = "tent"
    config_class = Config

    def _step(self, images: Tensor) -> Tensor:
        return step(images, model=self.model, optimizer=self._optimizer)
