"""Exploring Simple Siamese Representation Learning (SimSiam), arXiv 2011.10566.

No deliberate difference from the original code. Its projector has three layers; two are the authors' choice at CIFAR
size (appendix D).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.config import Flag, Width, config
from deepclust.methods.parts import base, heads, options
from deepclust.models import backbones


def symmetric_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """−½ [cos(p₁, sg z₂) + cos(p₂, sg z₁)], mean over the batch (equations 1, 3 and 4). All (B, D)."""
    return -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2


def _projector(inputs: int, hidden: int, outputs: int, *, layers: int) -> nn.Sequential:
    """Batch normalisation after every layer, ReLU after all but the last, whose normalisation is not affine."""
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        inputs = hidden
    return nn.Sequential(*modules, nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, affine=False))


@config
class Config(options.TrainedConfig):
    """SimSiam's options."""

    hidden_dim: Width = 2048
    """Width of the projector's hidden layers."""
    dim: Width = 2048
    """Dimension of the projections."""
    projector_layers: Literal[2, 3] = 3
    """Layers of the projector; two are the authors' choice at CIFAR's size."""
    predictor_dim: Width = 512
    """Width of the predictor's bottleneck."""
    constant_predictor_rate: Flag = True
    """Whether the predictor's learning rate stays constant (section 4.2)."""
    zero_init_residual: Flag = False
    """Whether each residual block of the backbone starts as the identity, where it has such blocks."""

    def _check(self) -> None:
        super()._check()
        self._check_two_crops()


class SimSiam(base.Method):
    """SimSiam.

    Args:
        backbone: Images to features.
        feature_dim: Dimension of the features.
        config: The options.
    """

    name = "simsiam"
    config: Config

    def __init__(self, backbone: nn.Module, feature_dim: int, config: Config) -> None:
        super().__init__(backbone, config)
        dim, bottleneck = config.dim, config.predictor_dim
        if config.zero_init_residual:
            backbones.zero_init_residual(backbone)
        self.projector = _projector(feature_dim, config.hidden_dim, dim, layers=config.projector_layers)
        self.predictor = nn.Sequential(
            nn.Linear(dim, bottleneck, bias=False),
            nn.BatchNorm1d(bottleneck),
            nn.ReLU(inplace=True),
            nn.Linear(bottleneck, dim),
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Backbone and projector, and the predictor with its own rate."""
        return [
            {"params": [*self.backbone.parameters(), *self.projector.parameters()]},
            {"params": list(self.predictor.parameters()), "constant_rate": self.config.constant_predictor_rate},
        ]

    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class."""
        # One view at a time, as in the original: batch normalisation never mixes the two.
        z1, z2 = (self.projector(self.backbone(view)) for view in views)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return symmetric_loss(p1, p2, z1, z2), {"embedding_spread": base.spread(heads.unit_rows(z1.detach()))}
