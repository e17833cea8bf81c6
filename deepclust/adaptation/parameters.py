"""Which parameters of a classifier learn."""

from __future__ import annotations

from typing import Literal

from torch import nn

from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.normalisation import BATCH_NORMS
from deepclust.errors import AdaptationError

AFFINE_NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

Parameters = Literal["all", "affine", "body", "head"]


def select_parameters(model: Classifier, which: Parameters) -> dict[str, nn.Parameter]:
    """Parameters by name, in the model's order.

    Args:
        model: The classifier.
        which: `all`; `affine`: weight and bias of the normalisations (batch, layer, group, instance); `body`: all but
            the head's; `head`.

    Raises:
        AdaptationError: If the model has no such parameters, or no linear head to tell by.
    """
    if which in ("body", "head"):
        model.check_head()
    head = {id(parameter) for parameter in model.head_parameters()}
    norms = {name for name, module in model.named_modules() if isinstance(module, AFFINE_NORMS)}
    selected = {
        name: parameter
        for name, parameter in model.named_parameters()
        if which == "all"
        or (which == "affine" and name.rpartition(".")[0] in norms)
        or (which == "body" and id(parameter) not in head)
        or (which == "head" and id(parameter) in head)
    }
    if not selected:
        raise AdaptationError(
            f"parameters {which!r}: this model has none to adapt; choose others, or the source adapter"
        )
    return selected
