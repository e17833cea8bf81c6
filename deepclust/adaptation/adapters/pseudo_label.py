"""Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks (Lee, ICML 2013
workshop WREPL), at test time as in the comparisons of Tent (arXiv 2006.10726) and T3A (NeurIPS 2021).

Each batch, one step on the cross-entropy to the model's own arg max, over the samples it is confident of. Deliberately
different from T3A's code, whose threshold of .9 this is: scale and shift of the normalisations learn rather than all
parameters, and BatchNorm takes batch statistics, both as in Tent, so that the two differ in the loss alone; a batch
without a confident sample takes no step, where the code's loss is the mean over nothing, NaN.

Shapes: B images, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deepclust.adaptation.base import Learner, LearnerConfig
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


def confident_loss(logits_BC: Tensor, *, threshold: float) -> Tensor | None:
    """Mean cross-entropy to the arg max of the samples whose largest probability exceeds the threshold, if any."""
    confidence_B, labels_B = logits_BC.detach().softmax(dim=1).max(dim=1)
    # Not `>`: NaN has to reach the loss, where it is an error, rather than pass for a lack of confidence.
    chosen_B = ~(confidence_B <= threshold)
    return F.cross_entropy(logits_BC[chosen_B], labels_B[chosen_B]) if chosen_B.any() else None


class PseudoLabel(Learner):
    """Learns its own confident predictions as if they were labels."""

    name = "pseudo_label"
    config_class = Config
    config: Config

    def _loss(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        logits_BC: Tensor = self.model(images)
        return logits_BC, confident_loss(logits_BC, threshold=self.config.threshold)
