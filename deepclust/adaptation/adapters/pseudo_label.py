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
from torch import Tensor, nn

from deepclust.adaptation.adapters.tent import collect_params, configure_model  # what learns, and how, is Tent's
from deepclust.adaptation.base import Learner, Predict, descend
from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.normalisation import check_batch_statistics, check_trained_statistics
from deepclust.adaptation.parameters import Parameters
from deepclust.errors import AdaptationError


def step(images: Tensor, *, model: Classifier, optimizer: torch.optim.Optimizer, threshold: float) -> Tensor:
    """Predict a batch and take one step on its confident samples, if any. Changes the model through the optimiser.

    Returns:
        Logits (B, C) from before the step.

    Raises:
        AdaptationError: If the loss is not finite; nothing is then changed.
    """
    with torch.enable_grad():
        logits_BC: Tensor = model(images)
        confidence_B, labels_B = logits_BC.detach().softmax(dim=1).max(dim=1)
        # Not `>`: NaN has to reach the loss, where it is an error, rather than pass for a lack of confidence.
        chosen_B = ~(confidence_B <= threshold)
        if chosen_B.any():
            descend(F.cross_entropy(logits_BC[chosen_B], labels_B[chosen_B]), optimizer, name="pseudo_label")
    return logits_BC.detach()


def check_model(model: Classifier, parameters: Parameters) -> None:
    """Check that the model has what pseudo-labels adapt.

    Raises:
        AdaptationError: If the chosen parameters do not exist, or BatchNorm never saw data.
    """
    collect_params(model, parameters)
    check_trained_statistics(model)


class PseudoLabel(Learner):
    """Learns its own confident predictions as if they were labels.

    Args:
        model: The source model; copied.
        rate: Adam's rate; 1e-3 is Tent's for the same parameters, for `all` or `body` 1e-4 is safer.
        parameters: Which parameters learn: `all`, `affine`, `body` or `head`.
        threshold: Probability that the arg max must exceed for its sample to count.
        steps: Gradient steps a batch.
        episodic: Forget everything before each batch.
        predict: Whether a batch's prediction is the model's `before` its first or `after` its last step.

    Raises:
        AdaptationError: If an option is out of range, or the model has nothing to adapt.
    """

    name = "pseudo_label"

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float = 1e-3,
        parameters: Parameters = "affine",
        threshold: float = 0.9,
        steps: int = 1,
        episodic: bool = False,
        predict: Predict = "before",
    ) -> None:
        if not 0 <= threshold < 1:
            raise AdaptationError(f"expected a threshold from 0 to below 1, a probability to exceed; got {threshold}")
        self.threshold = threshold
        super().__init__(model, rate=rate, parameters=parameters, steps=steps, episodic=episodic, predict=predict)

    def _check_model(self, model: Classifier) -> None:
        check_model(model, self.parameters)

    def _check_batch(self, images: Tensor) -> None:
        check_batch_statistics(images, self.model)

    def _configure(self, model: Classifier) -> Classifier:
        return configure_model(model, self.parameters)

    def _step(self, images: Tensor) -> Tensor:
        return step(images, model=self.model, optimizer=self._optimizer, threshold=self.threshold)
