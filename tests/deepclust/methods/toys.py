"""What the methods' tests train: 4×4 images, a linear backbone, and float64 by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from deepclust.methods.parts.base import Method

Array = NDArray[np.float64]


def normal(*shape: int, seed: int) -> Tensor:
    """Normal numbers that only the seed decides."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int) -> Tensor:
    """Rows of unit length."""
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def backbone(*, norm: bool = False) -> nn.Module:
    """Images (batch, 1, 4, 4) to 8 features."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), *([nn.BatchNorm1d(8)] if norm else []))


def embedder(images: Tensor) -> Callable[[nn.Module], Tensor]:
    """`Embed` for tensors that are already views."""

    def embed(module: nn.Module) -> Tensor:
        module.eval()
        with torch.no_grad():
            out: Tensor = module(images)
        module.train()
        return out

    return embed


def exact_rows(module: nn.Module, images: Tensor) -> Array:
    """Unit rows of a module's outputs, in float64 by numpy, from a copy that leaves the module as it is."""
    with torch.no_grad():
        outputs: Array = copy.deepcopy(module).double()(images.double()).numpy()
    return outputs / np.linalg.norm(outputs, axis=1, keepdims=True)


def log_softmax(logits: Array) -> Array:
    """Rows in float64."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def as_sets(rows: Tensor) -> Array:
    """Rows in an order of their own, to compare queues that keep theirs differently."""
    found = rows.double().numpy()
    return found[np.lexsort(found.T)]


def update(
    method: Method, step: int, parts: list[tuple[list[Tensor], Tensor]], *, rate: float, seed: int = 0
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """One update by plain gradient descent on the mean of the parts' losses, as the training loop makes it."""
    method.before_step(step)
    for parameter in method.parameters():
        parameter.grad = None
    generator = torch.Generator().manual_seed(seed)
    results = []
    for views, indices in parts:
        loss, logged = method.loss(views, indices, generator)
        (loss / len(parts)).backward()
        results.append((loss.detach(), logged))
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad)
    method.after_step(step)
    return results
