"""What the methods' tests train: 4×4 images, a linear backbone, small options, and float64 by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from deepclust.methods import METHODS, config_class, method_class
from deepclust.methods.parts.base import Method
from deepclust.methods.parts.options import TrainedConfig
from deepclust.training.optim import SGD
from deepclust.training.views import Crop

Array = NDArray[np.float64]
TRAINED = [name for name in METHODS if issubclass(config_class(name), TrainedConfig)]
# For some 40 to 80 images in batches of 16. Where an option switches something on, it is on.
_COMMON = {
    "epochs": 2, "batch_size": 16, "optimiser": SGD(rate=1.6), "crops": [Crop(scale=(0.7, 1.0))], "hidden_dim": 7,
    "dim": 6,
}  # fmt: skip
_KMEANS = {"kmeans_iterations": 5, "kmeans_restarts": 2}
_MOCO = {"key_momentum": 0.9, "queue_length": 32, "key_groups": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "swav": _COMMON | {
        "prototypes": [10, 5], "freeze_prototypes_steps": 2, "hard_assignment_steps": 3, "queue_length": 16,
        "queue_start_epoch": 1,
    },
    "deepcluster_v2": _COMMON | _KMEANS | {"prototypes": [10, 5]},
    "moco": _COMMON | _MOCO,
    "pcl": _COMMON | _MOCO | _KMEANS | {
        "clusters": [20, 30], "negatives": 4, "warmup_epochs": 1, "kmeans_every": 2, "kmeans_warm_start": True,
        "spherical": True,
    },
    "simsiam": _COMMON | {"predictor_dim": 4, "zero_init_residual": True},
}  # fmt: skip


def build(name: str, backbone: nn.Module, feature_dim: int, **changes: Any) -> Any:
    """The method with these options, but for the changes."""
    return method_class(name)(backbone, feature_dim, config_class(name)(**(OPTIONS[name] | changes)))


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
        with torch.no_grad():
            out: Tensor = module.eval()(images)
        module.train()
        return out

    return embed


def exact_rows(module: nn.Module, images: Tensor) -> Array:
    """Unit rows of a module's outputs, in float64 by numpy, from a copy that leaves the module as it is."""
    with torch.no_grad():
        outputs: Array = copy.deepcopy(module).double()(images.double()).numpy()
    return outputs / np.linalg.norm(outputs, axis=1, keepdims=True)


def as_sets(rows: Any) -> Array:
    """Rows in an order of their own, to compare queues that keep theirs differently."""
    found = np.asarray(rows, dtype=np.float64)
    return found[np.lexsort(found.T)]


def update(
    method: Method, step: int, views: list[Tensor], indices: Tensor, *, rate: float, parts: int = 1, seed: int = 0
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """One update by plain gradient descent, in equal parts, as the training loop makes it; what each part gave."""
    method.before_step(step)
    method.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    results = []
    for part_indices, *part_views in zip(*(rows.chunk(parts) for rows in (indices, *views)), strict=True):
        loss, logged = method.loss(part_views, part_indices, generator)
        (loss / parts).backward()
        assert not any(scalar.requires_grad for scalar in logged.values())
        results.append((loss.detach(), logged))
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad)
    method.after_step(step)
    return results
