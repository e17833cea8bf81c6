"""The contract of test-time adaptation, and what its methods share.

An adapter meets a stream of unlabelled, shifted batches: `adapter(images)` returns logits and may learn from the
images, `reset()` forgets everything since it was made. It works on a copy: the model it was given never changes.

A method's file has Tent's shape (arXiv 2006.10726): `collect_params` (what learns), `configure_model` (the state the
model must be in), `check_model` (whether it can be adapted, with the remedy), and one step as a free function.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from deepclust.errors import AdaptationError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
AFFINE_NORMS = (*BATCH_NORMS, nn.LayerNorm)

Parameters = Literal["all", "affine", "body", "head"]


class Classifier(nn.Module):
    """A featurizer and a linear head.

    Args:
        featurizer: Images to features (batch, dim).
        head: Features to logits.

    Raises:
        AdaptationError: If the head is not linear, or has fewer than two classes.
    """

    def __init__(self, featurizer: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise AdaptationError(
                f"expected a head of type nn.Linear, got {type(head).__name__}; "
                "move the layers before the last linear one into the featurizer"
            )
        if head.out_features < 2:
            raise AdaptationError(f"expected a head with at least two classes, got {head.out_features}")
        self.featurizer = featurizer
        self.head = head

    def features(self, images: Tensor) -> Tensor:
        """Features (batch, dim) of images.

        Raises:
            AdaptationError: If they do not fit the head.
        """
        features: Tensor = self.featurizer(images)
        if features.shape != (len(images), self.head.in_features):
            raise AdaptationError(
                f"expected features ({len(images)}, {self.head.in_features}), got {tuple(features.shape)}; "
                "give the head that was trained on this featurizer, and flatten what the featurizer returns"
            )
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images."""
        logits: Tensor = self.head(self.features(images))
        return logits


class Adapter(ABC):
    """A classifier that may learn from what it is asked.

    Args:
        model: The source model; copied.

    Attributes:
        model: The copy that adapts.
    """

    model: Classifier

    def __init__(self, model: Classifier) -> None:
        self._source = copy.deepcopy(model)
        self.reset()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of a batch of images (batch, …), without gradient.

        Raises:
            AdaptationError: If the batch can not be used; the adapter is then as before.
        """
        check_images(images)
        return self._adapt(images)

    @abstractmethod
    def _adapt(self, images: Tensor) -> Tensor:
        """Logits of a checked batch, and whatever the method learns from it."""

    def reset(self) -> None:
        """Forget all that was learnt: the adapter is as it was when made."""
        self.model = self._configure(copy.deepcopy(self._source))

    @abstractmethod
    def _configure(self, model: Classifier) -> Classifier:
        """Bring a fresh copy of the source model into the method's state."""


def select_parameters(model: Classifier, which: Parameters) -> dict[str, nn.Parameter]:
    """Parameters by name, in the model's order.

    Args:
        model: The classifier.
        which: `all`; `affine`: weight and bias of BatchNorm and LayerNorm; `body`: the featurizer's; `head`.

    Raises:
        AdaptationError: If there is no such choice, or the model has no such parameters.
    """
    if which not in get_args(Parameters):
        raise AdaptationError(f"expected parameters to be one of {', '.join(get_args(Parameters))}; got {which!r}")
    selected = {
        name: parameter
        for name, parameter in model.named_parameters()
        if which == "all"
        or (which == "body" and name.startswith("featurizer."))
        or (which == "head" and name.startswith("head."))
    }
    if which == "affine":
        norms = {name for name, module in model.named_modules() if isinstance(module, AFFINE_NORMS)}
        selected = {name: parameter for name, parameter in model.named_parameters() if name.rpartition(".")[0] in norms}
    if not selected:
        raise AdaptationError(
            f"parameters {which!r}: this model has none to adapt; choose others, or the source adapter"
        )
    return selected


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the model has a BatchNorm layer."""
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


def check_trained_statistics(model: nn.Module) -> None:
    """Check that BatchNorm's running statistics are those of training data, which batch statistics can stand in for.

    At their initial values (mean 0, variance 1) they normalise nothing: the head was then made for features that batch
    statistics would change altogether (measured on an untrained net: error .21 becomes .90 without any shift).

    Raises:
        AdaptationError: If the model has BatchNorm, and no such layer ever saw data.
    """
    means = [norm.running_mean for norm in model.modules() if isinstance(norm, BATCH_NORMS)]
    variances = [norm.running_var for norm in model.modules() if isinstance(norm, BATCH_NORMS)]
    tracked = [(mean, var) for mean, var in zip(means, variances, strict=True) if mean is not None and var is not None]
    if tracked and all(not mean.any() and (var == 1).all() for mean, var in tracked):
        raise AdaptationError(
            "batch statistics can not replace BatchNorm's running ones, which are still at their initial values: "
            "the model was never trained; train it, or use the source adapter"
        )


def use_batch_statistics(model: nn.Module) -> None:
    """Let BatchNorm normalise with each batch's own statistics, and forget the running ones. In place.

    The rest of the model goes to eval mode: dropout and stochastic depth would only add noise to the predictions.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.train()
            module.track_running_stats = False
            module.running_mean = None
            module.running_var = None


def check_images(images: Tensor) -> None:
    """Check a batch before anything learns from it.

    Raises:
        AdaptationError: If it is empty, not of floats, or holds NaN or infinity.
    """
    if images.ndim < 2 or not len(images):
        raise AdaptationError(f"expected a batch of images (batch, …), got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise AdaptationError(f"expected images as floats, got {images.dtype}; scale them as the source model expects")
    if not torch.isfinite(images).all():
        raise AdaptationError("expected finite images, got NaN or infinity; drop or mend these images")


def check_batch_statistics(images: Tensor, model: nn.Module) -> None:
    """Check that a batch is large enough to be normalised by its own statistics.

    Raises:
        AdaptationError: If a model with BatchNorm gets a single image.
    """
    if len(images) < 2 and has_batch_norm(model):
        raise AdaptationError(
            "expected at least two images a batch to take BatchNorm's statistics from, got one; "
            "collect a larger batch, or use the source adapter"
        )
