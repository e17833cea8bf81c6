"""SwAV (arXiv 2006.09882) on frozen features: a head predicts a point's Sinkhorn code from a neighbour of it, and back.

Differences: a point and one of its nearest neighbours stand for two crops of an image; prototypes start from clusters.
The prototypes are of unit length, as in the paper, the points, which are centred, only on average.

B batch, H heads, K clusters, which are the prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.clustering import heads
from deepclust.clustering.assigners import Assigner
from deepclust.clustering.base import Problem
from deepclust.clustering.heads import HeadConfig, Heads, Inputs, Objective
from deepclust.config import Count, Positive, config
from deepclust.methods.parts import sinkhorn


@config
class Config(HeadConfig):
    """Options of SwAV's head."""

    learning_rate: Positive = 0.05
    """Of Adam; falls to 0 along a cosine."""
    temperature: Positive = 0.2
    """τ of the softmax over the scores with the clusters."""
    epsilon: Positive = 0.1
    """ε of the codes: the smaller, the harder."""
    iterations: Count = 3
    """Alternations of Sinkhorn-Knopp."""


def fit(problem: Problem, options: Config) -> Assigner:
    """Train heads on pairs of neighbours."""
    inputs = Inputs.of(problem.features)
    best = heads.search(inputs, problem, lambda started: SwAV(started, options), options)
    return inputs.assigner(best)


def swapped_loss(
    points_BHK: Tensor, neighbours_BHK: Tensor, *, temperature: float, epsilon: float, iterations: int
) -> Tensor:
    """½ (ℓ(x, q′) + ℓ(x′, q)) of each head (H,), where ℓ(x, q) = -Σ_k q_k log softmax(s(x) / τ)_k (equations 1, 2).

    Args:
        points_BHK: Scores s(x).
        neighbours_BHK: Scores s(x′).
        temperature: τ.
        epsilon: ε of the codes q.
        iterations: Alternations that make them.
    """

    def codes(scores_BHK: Tensor) -> Tensor:
        each = scores_BHK.unbind(1)
        return torch.stack([sinkhorn.codes(scores, epsilon=epsilon, iterations=iterations) for scores in each], 1)

    one = (codes(neighbours_BHK) * heads.log_softmax(points_BHK / temperature)).sum(2)
    other = (codes(points_BHK) * heads.log_softmax(neighbours_BHK / temperature)).sum(2)
    return -(one + other).mean(0) / 2


class SwAV(Objective):
    """Swapped prediction; the heads' logits are scores divided by the temperature."""

    def __init__(self, heads: Heads, options: Config) -> None:
        super().__init__(heads)
        self.options = options
        self.after_step()

    def loss(self, points_BP: Tensor, neighbours_BP: Tensor) -> Tensor:
        options = self.options
        points, neighbours = (options.temperature * self.heads(part) for part in (points_BP, neighbours_BP))
        return swapped_loss(
            points,
            neighbours,
            temperature=options.temperature,
            epsilon=options.epsilon,
            iterations=options.iterations,
        )

    def after_step(self) -> None:
        with torch.no_grad():
            self.heads.weight.copy_(F.normalize(self.heads.weight, dim=2) / self.options.temperature)
            self.heads.bias.zero_()
