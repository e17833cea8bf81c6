"""SHOT-IM: Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain Adaptation
(arXiv 2002.08546, ICML 2020), section 3.2: its information maximisation alone, online.

Each batch, one step on the mean entropy of the predictions minus the entropy of their mean: each certain, all together
diverse. The head, the paper's source hypothesis, stays. Deliberately different:
- no pseudo-labels by clustering, which need the whole target set (the paper's own ablation calls this SHOT-IM);
- each batch is seen once, with Adam, as in T3A's comparison (its code searches 5e-6, 5e-5 and 5e-4 as the rate); the
  paper trains 15 epochs with SGD;
- the entropy of the mean is taken from logarithms; the code adds 1e-5 inside the logarithm, which biases it;
- dropout stays off; other parameters can be chosen. Both terms weigh the same: the source has no weight between them.

Shapes: B images, C classes.
"""

from __future__ import annotations

import math

from torch import Tensor

from deepclust.adaptation.adapters.tent import entropy
from deepclust.adaptation.base import Learner, LearnerConfig
from deepclust.adaptation.parameters import Parameters
from deepclust.config import Positive, config
from deepclust.errors import AdaptationError


@config
class Config(LearnerConfig):
    """SHOT-IM's options."""

    rate: Positive = 1e-4
    """Adam's rate; for `affine` alone 1e-3 is usual."""
    parameters: Parameters = "body"
    """Which parameters learn: `all`, `affine` (of the normalisations), `body` (all but the head's) or `head`."""


def information_loss(logits_BC: Tensor) -> Tensor:
    """Mean entropy of the predictions minus the entropy of the mean prediction: their mutual information, negated."""
    # A class that no sample has any probability for would make the gradient of p log p NaN; its logarithm does not.
    log_mean_C = logits_BC.log_softmax(dim=1).logsumexp(dim=0) - math.log(len(logits_BC))
    return entropy(logits_BC).mean() + (log_mean_C.exp() * log_mean_C).sum()


class ShotIM(Learner):
    """Makes each prediction certain and all of them together diverse."""

    name = "shot_im"
    config_class = Config

    def _check_batch(self, images: Tensor) -> None:
        # Adam would make whole steps of the rounding errors that are left of the gradient.
        if len(images) < 2:
            raise AdaptationError(
                "expected at least two images a batch, got one, whose prediction is its own mean and the loss always "
                "0; collect a larger batch, or use the source adapter"
            )

    def _loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits_BC: Tensor = self.model(images)
        return logits_BC, information_loss(logits_BC)
