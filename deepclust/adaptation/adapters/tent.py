"""Tent: Fully Test-Time Adaptation by Entropy Minimization (arXiv 2006.10726, ICLR 2021).

Each batch, one step on the mean entropy of its own predictions, by scale and shift of the normalisations; BatchNorm
normalises with the batch's statistics. Deliberately different: LayerNorm, GroupNorm and InstanceNorm count as affine
too, so that transformers can be adapted; dropout stays off; other parameters can be chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepclust.adaptation.base import Learner, Predict, descend, learn_only
from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.normalisation import check_batch_statistics, check_trained_statistics, use_batch_statistics
from deepclust.adaptation.parameters import AFFINE_NORMS, Parameters, select_parameters
from deepclust.errors import AdaptationError


def entropy(logits_BC: Tensor) -> Tensor:
    """Entropy (B,) in nats of the softmax of logits."""
    log_p_BC = logits_BC.log_softmax(dim=1)
    return -(log_p_BC.exp() * log_p_BC).sum(dim=1)


def step(images: Tensor, *, model: Classifier, optimizer: torch.optim.Optimizer) -> Tensor:
    """Predict a batch and take one step on the mean entropy. Changes the model through the optimiser.

    Returns:
        Logits (B, C) from before the step.

    Raises:
        AdaptationError: If the loss is not finite; nothing is then changed.
    """
    with torch.enable_grad():
        logits_BC: Tensor = model(images)
        descend(entropy(logits_BC).mean(), optimizer, name="tent")
    return logits_BC.detach()


def collect_params(model: Classifier, parameters: Parameters) -> list[nn.Parameter]:
    """The parameters that learn. Raises: AdaptationError, if there are none."""
    return list(select_parameters(model, parameters).values())


def configure_model(model: Classifier, parameters: Parameters) -> Classifier:
    """Batch statistics in BatchNorm, eval mode elsewhere, gradients for the chosen parameters alone. In place."""
    use_batch_statistics(model)
    return learn_only(model, parameters)


def check_model(model: Classifier, parameters: Parameters) -> None:
    """Check that the model has what Tent adapts.

    Raises:
        AdaptationError: If the chosen parameters do not exist, or BatchNorm never saw data.
    """
    if parameters == "affine" and not any(isinstance(module, AFFINE_NORMS) for module in model.modules()):
        raise AdaptationError(
            "tent adapts scale and shift of normalisation layers, and this model has none; "
            "choose other parameters, or use the source adapter"
        )
    collect_params(model, parameters)
    check_trained_statistics(model)


class Tent(Learner):
    """Makes its predictions more certain.

    Args:
        model: The source model; copied.
        rate: Adam's rate; the paper's is 1e-3 at batch 128 or 200 (its CIFAR experiments).
        parameters: Which parameters learn: `all`, `affine`, `body` or `head`.
        steps: Gradient steps a batch.
        episodic: Forget everything before each batch.
        predict: Whether a batch's prediction is the model's `before` its first or `after` its last step.

    Raises:
        AdaptationError: If an option is out of range, or the model has nothing that Tent could adapt.
    """

    name = "tent"

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float = 1e-3,
        parameters: Parameters = "affine",
        steps: int = 1,
        episodic: bool = False,
        predict: Predict = "before",
    ) -> None:
        super().__init__(model, rate=rate, parameters=parameters, steps=steps, episodic=episodic, predict=predict)

    def _check_model(self, model: Classifier) -> None:
        check_model(model, self.parameters)

    def _check_batch(self, images: Tensor) -> None:
        check_batch_statistics(images, self.model)

    def _configure(self, model: Classifier) -> Classifier:
        return configure_model(model, self.parameters)

    def _step(self, images: Tensor) -> Tensor:
        return step(images, model=self.model, optimizer=self._optimizer)
