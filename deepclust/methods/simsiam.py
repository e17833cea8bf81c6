"""Exploring Simple Siamese Representation Learning (SimSiam), arXiv 2011.10566.

Difference from the paper: the projector has two layers, as the authors use at CIFAR size (appendix D).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.methods import base


def symmetric_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """−½ [cos(p₁, sg z₂) + cos(p₂, sg z₁)], mean over the batch (equations 1, 3 and 4). All (B, D)."""
    return -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2


class SimSiam(base.Method):
    """SimSiam.

    Args:
        backbone: Images to features.
        feature_dim: Dimension of the features.
        hidden_dim: Width of the projector's hidden layer.
        dim: Dimension of the projections.
        predictor_dim: Width of the predictor's bottleneck.
        constant_predictor_rate: Keep the predictor's learning rate constant (section 4.2).
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        hidden_dim: int,
        dim: int,
        predictor_dim: int,
        constant_predictor_rate: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(feature_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, dim, bias=False),
            nn.BatchNorm1d(dim, affine=False),
        )
        self.predictor = nn.Sequential(
            nn.Linear(dim, predictor_dim, bias=False),
            nn.BatchNorm1d(predictor_dim),
            nn.ReLU(inplace=True),
            nn.Linear(predictor_dim, dim),
        )
        self.constant_predictor_rate = constant_predictor_rate

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Backbone and projector, and the predictor with its own rate."""
        return [
            {"params": [*self.backbone.parameters(), *self.projector.parameters()]},
            {"params": list(self.predictor.parameters()), "constant_rate": self.constant_predictor_rate},
        ]

    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class. Logs the mean std of z/‖z‖ over its dimensions: 1/√D is healthy, 0 is collapse."""
        # One view at a time, as in the original: batch normalisation never mixes the two.
        z1, z2 = (self.projector(self.backbone(view)) for view in views)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        spread = F.normalize(z1.detach(), dim=1).std(0).mean()
        return symmetric_loss(p1, p2, z1, z2), {"embedding_std": spread}
