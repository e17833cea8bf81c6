"""BatchNorm under a shift: whose statistics normalise.

Shapes: B images, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepclust.adaptation.classifier import check_images
from deepclust.errors import AdaptationError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers, in the model's order."""
    return [module for module in model.modules() if isinstance(module, BATCH_NORMS)]


def check_trained_statistics(model: nn.Module) -> None:
    """Check that BatchNorm's running statistics are those of training data, which batch statistics can stand in for.

    At their initial values (mean 0, variance 1) they normalise nothing: the head was then made for features that batch
    statistics would change altogether (measured on an untrained net: error .21 becomes .90 without any shift).

    Raises:
        AdaptationError: If the model has BatchNorm, and no such layer ever saw data.
    """
    tracked = [
        (norm.running_mean, norm.running_var)
        for norm in batch_norms(model)
        if norm.running_mean is not None and norm.running_var is not None
    ]
    if tracked and all(not mean.any() and (var == 1).all() for mean, var in tracked):
        raise AdaptationError(
            "batch statistics can not replace BatchNorm's running ones, which are still at their initial values: "
            "the model was never trained; train it, or use the source adapter"
        )


def check_batch_statistics(images: Tensor, model: nn.Module) -> None:
    """Raises AdaptationError if a model with BatchNorm gets a single image, which has no statistics of its own."""
    if len(images) < 2 and batch_norms(model):
        raise AdaptationError(
            "expected at least two images a batch to take BatchNorm's statistics from, got one; "
            "collect a larger batch, or use the source adapter"
        )


def use_batch_statistics(model: nn.Module) -> None:
    """Let BatchNorm normalise with each batch's own statistics, and forget the running ones. In place.

    The rest of the model goes to eval mode: dropout and stochastic depth would only add noise to the predictions.
    """
    model.eval()
    for norm in batch_norms(model):
        # Not train(): it would reach the dropout or random activation that a BatchNorm of timm's holds.
        norm.training = True
        norm.track_running_stats = False
        norm.running_mean = None
        norm.running_var = None


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and biased variance (C,) of values (B, C, …), as BatchNorm takes them."""
    dims = [dim for dim in range(values.dim()) if dim != 1]
    variance_C, mean_C = torch.var_mean(values, dim=dims, correction=0)
    return mean_C, variance_C


def renormalise(norm: _BatchNorm, values: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
    """Values (B, C, …) which BatchNorm in eval mode turns into what the given statistics make of `values`.

    So any statistics can be used with any kind of BatchNorm, whatever it does after normalising.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    shape = (1, -1, *[1] * (values.dim() - 2))
    scale_C = ((norm.running_var + norm.eps) / (variance_C + norm.eps)).sqrt()
    return (values - mean_C.view(shape)) * scale_C.view(shape) + norm.running_mean.view(shape)


def blend_statistics(model: nn.Module, prior: float) -> None:
    """Let BatchNorm normalise with statistics between the running ones and each batch's (arXiv 2006.16971, section 3).

    In place; eval mode. The running ones count as much as `prior` images: N / (N + B).
    """
    model.eval()
    for norm in batch_norms(model):
        norm.register_forward_pre_hook(partial(_blend, prior))


def _blend(prior: float, norm: _BatchNorm, given: tuple[Tensor, ...]) -> tuple[Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean_C, variance_C = statistics(given[0])
    weight = prior / (prior + len(given[0]))
    mean_C = weight * norm.running_mean + (1 - weight) * mean_C
    variance_C = weight * norm.running_var + (1 - weight) * variance_C
    return (renormalise(norm, given[0], mean_C, variance_C),)


@torch.no_grad()
def align_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Make BatchNorm's running statistics those of source images, without changing what the model computes. In place.

    A self-supervised encoder's running statistics are those of augmented views. The head was trained on plain images,
    so batch statistics of plain images, without any shift, already give it features that it never saw. Here weight and
    bias of each layer take up the difference: in eval mode the model stays the same function, up to rounding, and on
    source images batch statistics agree with it, so that what they change is the shift's.

    Args:
        model: With BatchNorm that has running statistics and is affine; others are left alone.
        batches: Images of the source (B, …), as the model is asked; labels are not needed.

    Raises:
        AdaptationError: If there are no images, or they or what the layers make of them are not finite; the model is
            then as before.
    """
    norms = [norm for norm in batch_norms(model) if norm.affine and norm.running_mean is not None]
    sums: dict[_BatchNorm, list[Tensor]] = {}

    def collect(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        # One copy, changed in place: of large images, making room for more takes longer than the sums.
        values = given[0].to(torch.float64, copy=True)
        dims = [dim for dim in range(values.dim()) if dim != 1]
        count = values.new_tensor(values.numel() / values.shape[1])
        # About the running mean, so that nothing is lost to cancellation.
        values -= norm.running_mean.double().view(1, -1, *[1] * (values.dim() - 2))  # type: ignore[union-attr]
        new = [count, values.sum(dims), values.square_().sum(dims)]
        sums[norm] = [old + add for old, add in zip(sums[norm], new, strict=True)] if norm in sums else new

    modes = [(module, module.training) for module in model.modules()]
    handles = [norm.register_forward_pre_hook(collect) for norm in norms]
    model.eval()
    count = 0
    try:
        for images in batches:
            check_images(images)
            model(images)
            count += len(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if not count:
        raise AdaptationError("expected images of the source to take BatchNorm's statistics from, got none")
    if not all(torch.isfinite(value).all() for values in sums.values() for value in values):
        raise AdaptationError("BatchNorm is given NaN or infinity on these images; mend the model, or leave them out")
    for norm, (total, first, second) in sums.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        offset = first / total
        mean, variance = norm.running_mean.double() + offset, second / total - offset.square()
        old = (norm.running_var.double() + norm.eps).sqrt()
        norm.bias.add_((norm.weight.double() * offset / old).to(norm.bias))
        norm.weight.mul_(((variance + norm.eps).sqrt() / old).to(norm.weight))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
