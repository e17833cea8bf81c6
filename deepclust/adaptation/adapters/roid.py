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

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.adaptation.adapters.tent import (  # what learns, and how, is Tent's
    collect_params,
    configure_model,
    entropy,
)
from deepclust.adaptation.base import Learner, Predict, check_shapes, descend
from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.normalisation import check_batch_statistics, check_trained_statistics
from deepclust.adaptation.parameters import AFFINE_NORMS, Parameters, select_parameters
from deepclust.adaptation.views import view
from deepclust.errors import AdaptationError

PriorCorrection = Literal["probabilities", "logits", "none"]

PROBABILITY_MOMENTUM = 0.9
"""Share of itself that the mean prediction over the stream keeps at each batch."""


def soft_likelihood_ratio(logits_BC: Tensor, *, clip: float = 0.99, eps: float = 1e-5) -> Tensor:
    """−Σ_c p_c log(p_c / (1 − p_c)) for each image (B,).

    Args:
        logits_BC: Logits.
        clip: Probabilities above it are cut, and get no gradient.
        eps: Added in the logarithm.
    """
    p_BC = logits_BC.softmax(dim=1).clamp(max=clip)
    return -(p_BC * (p_BC / (1 - p_BC) + eps).log()).sum(dim=1)


def symmetric_cross_entropy(left_BC: Tensor, right_BC: Tensor) -> Tensor:
    """½ [H(right, left) + H(left, right)] of the softmax of logits, for each image (B,)."""
    log_left_BC, log_right_BC = left_BC.log_softmax(dim=1), right_BC.log_softmax(dim=1)
    return -(log_right_BC.exp() * log_left_BC + log_left_BC.exp() * log_right_BC).sum(dim=1) / 2


def sample_weights(logits_BC: Tensor, mean_C: Tensor, *, temperature: float) -> Tensor:
    """exp(diversity · certainty / τ) for each image (B,), 0 where the diversity is below its mean.

    Args:
        logits_BC: Logits; constants.
        mean_C: Mean prediction over the stream; diversity is 1 − its cosine with the image's prediction.
        temperature: τ.
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
    the batch and the less even the prior, the less it is believed.

    Args:
        logits_BC: Logits.
        how: Whether the prior weights the `probabilities` or the `logits`; `none` leaves both.
    """
    if how == "none":
        return logits_BC
    count, classes = logits_BC.shape
    prior_C = logits_BC.softmax(dim=1).mean(dim=0)
    smooth = max(1 / count, 1 / classes) / prior_C.max()
    prior_C = (prior_C + smooth) / (1 + smooth * classes)
    return logits_BC + prior_C.log() if how == "probabilities" else logits_BC * prior_C


def step(
    images: Tensor,
    mean_C: Tensor | None,
    *,
    model: Classifier,
    source: dict[str, Tensor],
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    momentum: float,
    temperature: float,
    flip: bool,
) -> tuple[Tensor, Tensor]:
    """Predict a batch, take one step on its loss, and go a little back to the source. Changes the model.

    Args:
        images: The batch.
        mean_C: Mean prediction over the stream before the batch; None where the stream begins: all classes alike.
        model: Adapts.
        source: What the learning parameters were at the source, by name.
        parameters: Which parameters learn.
        optimizer: Theirs.
        generator: Source of the view's randomness.
        momentum: Share of itself that the model keeps against the source.
        temperature: τ of the weights.
        flip: Whether the view may be flipped.

    Returns:
        Logits (B, C) from before the step, not corrected, and the mean prediction with the batch.

    Raises:
        AdaptationError: If the loss is not finite; nothing is then changed but the generator.
    """
    with torch.enable_grad():
        logits_BC: Tensor = model(images)
        p_BC = logits_BC.detach().softmax(dim=1)
        if mean_C is None:
            mean_C = torch.full_like(p_BC[0], 1 / p_BC.shape[1])
        weights_B = sample_weights(logits_BC, mean_C, temperature=temperature)
        viewed_BC: Tensor = model(view(images, generator=generator, flip=flip))
        losses_B = soft_likelihood_ratio(logits_BC) + symmetric_cross_entropy(viewed_BC, logits_BC)
        descend((weights_B * losses_B).mean(), optimizer, name="roid")
    with torch.no_grad():
        for name, parameter in select_parameters(model, parameters).items():
            parameter.lerp_(source[name], 1 - momentum)
    return logits_BC.detach(), PROBABILITY_MOMENTUM * mean_C + (1 - PROBABILITY_MOMENTUM) * p_BC.mean(dim=0)


def check_model(model: Classifier, parameters: Parameters) -> None:
    """Check that the model has what ROID adapts.

    Raises:
        AdaptationError: If the chosen parameters do not exist, or BatchNorm never saw data.
    """
    if parameters == "affine" and not any(isinstance(module, AFFINE_NORMS) for module in model.modules()):
        raise AdaptationError(
            "roid adapts scale and shift of normalisation layers, and this model has none; "
            "choose other parameters, or use the source adapter"
        )
    collect_params(model, parameters)
    check_trained_statistics(model)


class ROID(Learner):
    """Makes certain and diverse predictions more certain and consistent, close to the source.

    Args:
        model: The source model; copied.
        rate: Adam's rate; the paper's for CIFAR.
        parameters: Which parameters learn: `all`, `affine`, `body` or `head`.
        momentum: Share of itself that the model keeps at each step; the rest is the source's.
        temperature: τ of the weights of images.
        prior_correction: What the batch's classes weight: `probabilities`, `logits`, or nothing (`none`).
        flip: Whether the second view may be flipped left to right; not for digits and letters.
        seed: Of the second views.
        steps: Gradient steps a batch.
        episodic: Forget everything before each batch.
        predict: Whether a batch's prediction is the model's `before` its first or `after` its last step.

    Attributes:
        mean_prediction: Mean prediction (classes,) over the stream; None before the first batch.

    Raises:
        AdaptationError: If an option is out of range, or the model has nothing that ROID could adapt.
    """

    name = "roid"
    mean_prediction: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float = 1e-3,
        parameters: Parameters = "affine",
        momentum: float = 0.99,
        temperature: float = 1 / 3,
        prior_correction: PriorCorrection = "probabilities",
        flip: bool = True,
        seed: int = 0,
        steps: int = 1,
        episodic: bool = False,
        predict: Predict = "before",
    ) -> None:
        if not (0 <= momentum <= 1 and temperature > 0):
            raise AdaptationError(
                f"expected a momentum from 0 to 1 and a temperature above 0, got {momentum} and {temperature}"
            )
        if prior_correction not in get_args(PriorCorrection):
            raise AdaptationError(
                f"expected prior_correction to be one of {', '.join(get_args(PriorCorrection))}; "
                f"got {prior_correction!r}"
            )
        self.momentum, self.temperature, self.prior_correction = momentum, temperature, prior_correction
        self.flip, self.seed = flip, seed
        super().__init__(model, rate=rate, parameters=parameters, steps=steps, episodic=episodic, predict=predict)

    def _check_model(self, model: Classifier) -> None:
        check_model(model, self.parameters)

    def _check_batch(self, images: Tensor) -> None:
        check_batch_statistics(images, self.model)

    def _configure(self, model: Classifier) -> Classifier:
        return configure_model(model, self.parameters)

    def _start(self) -> None:
        super()._start()
        self._source = {name: parameter.detach().clone() for name, parameter in self._learning.items()}
        self.mean_prediction = None
        self._generator = torch.Generator().manual_seed(self.seed)

    def _begin(self, images: Tensor) -> None:
        self._before = self.mean_prediction

    def _adapt(self, images: Tensor) -> Tensor:
        return correct_prior(super()._adapt(images), how=self.prior_correction)

    def _step(self, images: Tensor) -> Tensor:
        # Every step starts from the mean before the batch, so that the batch counts once, by its newest prediction.
        logits_BC, self.mean_prediction = step(
            images,
            self._before,
            model=self.model,
            source=self._source,
            parameters=self.parameters,
            optimizer=self._optimizer,
            generator=self._generator,
            momentum=self.momentum,
            temperature=self.temperature,
            flip=self.flip,
        )
        return logits_BC

    def _state(self) -> dict[str, Any]:
        return super()._state() | {
            "mean_prediction": self.mean_prediction,
            "generator": self._generator.get_state(),
        }

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
