"""Momentum Contrast for Unsupervised Visual Representation Learning (MoCo), arXiv 1911.05722, and v2, arXiv 2003.04297.

v1 has a linear head, v2 one with a hidden layer. Differences from the original code, all deliberate:
- The keys are shuffled between groups of one batch (section 3.3); the original shuffles them between GPUs.
- v2's head normalises its hidden layer; the original's has no batch normalisation there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepclust.config import config
from deepclust.methods.parts.momentum_contrast import MomentumConfig, MomentumContrast


@config
class Config(MomentumConfig):
    """MoCo's options."""


class MoCo(MomentumContrast):
    """MoCo: InfoNCE of a query with its key against the queue. See `MomentumContrast`."""

    name = "moco"

    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class. InfoNCE.

        Raises:
            ConfigError: If a group of keys would have a single row.
        """
        _, instance, logged = self.contrast(views, generator)
        return instance, logged
