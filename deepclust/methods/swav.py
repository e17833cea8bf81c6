"""Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (SwAV), arXiv 2006.09882.

Differences from the original code, all deliberate:
- Sinkhorn runs in the log domain and in float32 at least, so it neither overflows nor divides in half precision.
- Frozen prototypes get no gradient at all, so neither weight decay nor momentum moves them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import heads, sinkhorn
from deepclust.methods import base


def swapped_loss(scores: Sequence[Tensor], codes: dict[int, Tensor], *, temperature: float) -> Tensor:
    """Predict the code of one crop from the scores of every other (section 3.1, equations 1 and 2; multi-crop, eq. 6).

    Args:
        scores: For each crop, scores (B, K).
        codes: For each assign crop, its codes (B, K).
        temperature: τ of the softmax over the prototypes.

    Returns:
        Mean over assign crops of the mean over the other crops of −Σ_k q_k log softmax(s / τ)_k.
    """
    log_probabilities = [F.log_softmax(score / temperature, dim=1) for score in scores]
    losses = []
    for assign_crop, code in codes.items():
        others = [
            -(code * log_probability).sum(1).mean()
            for crop, log_probability in enumerate(log_probabilities)
            if crop != assign_crop
        ]
        losses.append(torch.stack(others).mean())
    return torch.stack(losses).mean()


class SwAV(base.Method):
    """SwAV.

    Args:
        backbone: Images to features.
        feature_dim: Dimension of the features.
        hidden_dim: Width of the head's hidden layer; 0 for a linear head.
        dim: Dimension of the embeddings.
        prototypes: Number of prototypes, K; about ten times the number of classes.
        temperature: τ of the prediction.
        epsilon: Entropy weight of the codes; smaller against collapse.
        sinkhorn_iterations: Alternations for the codes.
        assign_crops: Numbers of the crops that codes are computed for.
        freeze_prototypes_steps: First steps in which the prototypes do not move.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        hidden_dim: int,
        dim: int,
        prototypes: int,
        temperature: float,
        epsilon: float,
        sinkhorn_iterations: int,
        assign_crops: Sequence[int],
        freeze_prototypes_steps: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = heads.projection(feature_dim, hidden_dim, dim)
        self.prototypes = heads.Prototypes(prototypes, dim)
        self.temperature = temperature
        self.epsilon = epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        self.assign_crops = tuple(assign_crops)
        self.freeze_prototypes_steps = freeze_prototypes_steps

    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class. Logs the share of prototypes that are some sample's strongest code."""
        self.prototypes.normalise()
        embeddings = F.normalize(self.head(base.by_resolution(self.backbone, views)), dim=1)
        scores = self.prototypes(embeddings).chunk(len(views))
        codes = {
            crop: sinkhorn.codes(scores[crop], epsilon=self.epsilon, iterations=self.sinkhorn_iterations)
            for crop in self.assign_crops
        }
        used = torch.bincount(torch.cat([code.argmax(1) for code in codes.values()]), minlength=scores[0].shape[1]) > 0
        return (
            swapped_loss(scores, codes, temperature=self.temperature),
            {"prototypes_used": used.float().mean()},
        )

    def after_backward(self, step: int) -> None:
        """Keep the prototypes where they are while they are frozen."""
        if step < self.freeze_prototypes_steps:
            self.prototypes.weight.grad = None
