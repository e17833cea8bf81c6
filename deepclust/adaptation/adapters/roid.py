"""ROID: Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior Correction.

arXiv 2306.00650, WACV 2024. Each batch, one step on the soft likelihood ratio of the predictions and on their agreement
with those of a second view, where certain and diverse images count more; then the weights go a little back to the
source's. Predictions are corrected for the classes that the batch seems to hold. Deliberately different:
- the second view is that of `views.view`; the paper's augmentation assumes colour photographs in [0, 1];
- the whole batch is viewed again and images of weight 0 left out of the loss; the code views only the others, whose
  batch statistics may be those of a single image;
- the prior weights the probabilities, as in Bayes' rule; the code multiplies the logits by it, so that adding a
  constant to them changes the prediction: `prior_correction="logits"`;
- where all images are equally certain or diverse they count the same; the code divides 0 by 0;
- InstanceNorm counts as affine too.

Shapes: B images, C classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.adaptation.adapters.tent import entropy
from deepclust.adaptation.base import Learner, LearnerConfig, check_shapes
from deepclust.adaptation.views import view
from deepclust.config import Flag, Natural, Positive, Share, config

PriorCorrection = Literal["probabilities", "logits", "none"]

PROBABILITY_MOMENTUM = 0.9
"""Share of itself that the mean prediction over the stream keeps at each batch."""


@config
class Config(LearnerConfig):
    """ROID's options."""

    rate: Positive = 1e-3
    """Adam's rate; the paper's for CIFAR."""
    momentum: Share = 0.99
    """Share of itself that the model keeps at each step; the rest is the source's."""
    temperature: Positive = 1 / 3
    """τ of the weights of images."""
    prior_correction: PriorCorrection = "probabilities"
    """What the batch's classes weight: `probabilities`, `logits`, or nothing (`none`)."""
    flip: Flag = True
    """Whether the second view may be flipped left to right; not for digits and letters."""
    seed: Natural = 0
    """Of the second views."""

    @property
    def passes(self) -> float:
        """As of every learner, with a second view at each step."""
        return super().passes + self.steps * self.step_passes


def soft_likelihood_ratio(logits_BC: Tensor, *, clip: float = 0.99, eps: float = 1e-5) -> Tensor:
    """−Σ_c p_c log(p_c / (1 − p_c) + eps) for each image (B,). Probabilities above `clip` are cut, without gradient."""
    p_BC = logits_BC.softmax(dim=1).clamp(max=clip)
    return -(p_BC * (p_BC / (1 - p_BC) + eps).log()).sum(dim=1)


def symmetric_cross_entropy(left_BC: Tensor, right_BC: Tensor) -> Tensor:
    """½ [H(right, left) + H(left, right)] of the softmax of logits, for each image (B,)."""
    log_left_BC, log_right_BC = left_BC.log_softmax(dim=1), right_BC.log_softmax(dim=1)
    return -(log_right_BC.exp() * log_left_BC + log_left_BC.exp() * log_right_BC).sum(dim=1) / 2


def sample_weights(logits_BC: Tensor, mean_C: Tensor, *, temperature: float) -> Tensor:
    """exp(diversity · certainty / τ) for each image (B,), 0 where the diversity is below its mean; constants.

    Diversity is 1 − the cosine of the image's prediction with the mean prediction over the stream.
    """
    p_BC = logits_BC.detach().softmax(dim=1)
    diversity_B = _between_0_and_1(1 - F.cosine_similarity(mean_C.unsqueeze(0), p_BC, dim=1))
    certainty_B = _between_0_and_1(-entropy(logits_BC.detach()))
    weights_B = (diversity_B * certainty_B / temperature).exp()
    return weights_B.masked_fill(diversity_B < diversity_B.mean(), 0)


def _between_0_and_1(values_B: Tensor) -> Tensor:
    low, high = values_B.aminmax()
    return (values_B - low) / (high - low) if high > low else torch.zeros_like(values_B)


def correct_prior(logits_BC: Tensor, *, how: PriorCorrection) -> Tensor:
    """Logits (B, C) that expect the classes that the batch seems to hold.

    The prior is the mean prediction of the batch, with γ = max(1/B, 1/C) / max prior added to each class: the smaller
    the batch and the less even the prior, the less it is believed. It weights the `probabilities` or the `logits`.
    """
    if how == "none":
        return logits_BC
    count, classes = logits_BC.shape
    prior_C = logits_BC.softmax(dim=1).mean(dim=0)
    smooth = max(1 / count, 1 / classes) / prior_C.max()
    prior_C = (prior_C + smooth) / (1 + smooth * classes)
    return logits_BC + prior_C.log() if how == "probabilities" else logits_BC * prior_C


class ROID(Learner):
    """Makes certain and diverse predictions more certain and consistent, close to the source.

    Attributes:
        mean_prediction: Mean prediction (classes,) over the stream; None before the first batch: all classes alike.
    """

    name = "roid"
    config_class = Config
    config: Config
    mean_prediction: Tensor | None

    def _start(self) -> None:
        super()._start()
        self._source = {name: parameter.detach().clone() for name, parameter in self._learning.items()}
        self.mean_prediction = None
        self._generator = torch.Generator().manual_seed(self.config.seed)

    def _adapt(self, images: Tensor) -> Tensor:
        self._before = self.mean_prediction
        return correct_prior(super()._adapt(images), how=self.config.prior_correction)

    def _loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits_BC: Tensor = self.model(images)
        p_BC = logits_BC.detach().softmax(dim=1)
        # Every step starts from the mean before the batch, so that the batch counts once, by its newest prediction.
        mean_C = torch.full_like(p_BC[0], 1 / p_BC.shape[1]) if self._before is None else self._before
        self.mean_prediction = PROBABILITY_MOMENTUM * mean_C + (1 - PROBABILITY_MOMENTUM) * p_BC.mean(dim=0)
        weights_B = sample_weights(logits_BC, mean_C, temperature=self.config.temperature)
        viewed_BC: Tensor = self.model(view(images, generator=self._generator, flip=self.config.flip))
        losses_B = soft_likelihood_ratio(logits_BC) + symmetric_cross_entropy(viewed_BC, logits_BC)
        return logits_BC, (weights_B * losses_B).mean()

    @torch.no_grad()
    def _step(self, images: Tensor) -> Tensor:
        logits_BC = super()._step(images)
        for name, parameter in self._learning.items():
            parameter.lerp_(self._source[name], 1 - self.config.momentum)
        return logits_BC

    def _state(self) -> dict[str, Any]:
        own = {"mean_prediction": self.mean_prediction, "generator": self._generator.get_state()}
        return super()._state() | own

    def _check_state(self, state: dict[str, Any]) -> None:
        super()._check_state(state)
        own, new = self.mean_prediction, state["mean_prediction"]
        if own is not None and new is not None:
            check_shapes({"mean_prediction": own}, {"mean_prediction": new})

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        mean_C = state["mean_prediction"]
        self.mean_prediction = None if mean_C is None else mean_C.to(self.device)
        self._generator.set_state(state["generator"].cpu())
