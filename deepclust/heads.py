"""What sits on a backbone during pretraining: projection heads, predictors and prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def projection(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """A projection head: linear if `hidden` is 0, else one hidden layer with batch normalisation and ReLU."""
    if hidden == 0:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    )


class Prototypes(nn.Module):
    """K prototypes of unit length, without bias (SwAV, arXiv 2006.09882, section 3.1).

    `normalise` brings the rows back to unit length; it belongs before every forward pass that follows a weight update.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, dim), dim=1))

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale each row to unit length, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores (batch, count) of unit embeddings (batch, dim)."""
        return embeddings @ self.weight.T
