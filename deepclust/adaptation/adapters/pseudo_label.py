"""Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks (Lee, ICML 2013
workshop WREPL), at test time as in the comparisons of Tent (arXiv 2006.10726) and T3A (NeurIPS 2021).

Each batch, one step on the cross-entropy to the model's own arg max, over the samples it is confident of. Deliberately
different from T3A's code, whose threshold of .9 this is: scale and shift of the normalisations learn rather than all
parameters, and BatchNorm takes batch statistics, both as in Tent, so that the two differ in the loss alone; a batch
without a confident sample takes no step, where the code's loss is the mean over nothing, NaN.

Shapes: B images, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.adaptation.base import Learner, LearnerConfig, descend
from deepclust.adaptation.classifier import Classifier
from deepclust.config import Positive, Share, config


@config
class Config(LearnerConfig):
    """The options of pseudo-labels."""

    rate: Positive = 1e-3
    """Adam's rate; 1e-3 is Tent's for the same parameters, for `all` or `body` 1e-4 is safer."""
    threshold: Share = 0.9
    """Probability that the arg max must exceed for its sample to count; below 1."""

    def _check(self) -> None:
        if self.threshold == 1:
            raise ValueError("threshold is 1, which no probability exceeds; choose one below 1")


def step(images: Tensor, *, model: Classifier, optimizer: torch.optim.Optimizer, threshold: float) -> Tensor:
    """Predict a batch and take one step on its confident samples, if any. Changes the model through the optimiser.

    Returns:
        Logits (B, C) from before the step.

    Raises:
        AdaptationError: If loss, gradient or logits are not finite; nothing is then changed.
    """
    with torch.enable_grad():
        logits_BC: Tensor = model(images)
        confidence_B, labels_B = logits_BC.detach().softmax(dim=1).max(dim=1)
        # Not `>`: NaN has to reach the loss, where it is an error, rather than pass for a lack of confidence.
        chosen_B = ~(confidence_B <= threshold)
        if chosen_B.any():
            loss = F.cross_entropy(logits_BC[chosen_B], labels_B[chosen_B])
            descend(loss, logits_BC, optimizer, name="pseudo_label")
    return logits_BC.detach()


class PseudoLabel(Learner):
    """Learns its own confident predictions as if they were labels."""

    name = "pseudo_label"
    config_class = Config
    config: Config

    def _step(self, images: Tensor) -> Tensor:
        return step(images, model=self.model, optimizer=self._optimizer, threshold=self.config.threshold)
