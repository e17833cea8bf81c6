"""LAME: Parameter-free Online Test-time Adaptation (arXiv 2201.05718, CVPR 2022).

The model stays as it is. The predictions of a batch are moved towards each other where features are alike: minimise the
objective Σ_i KL(y_i ‖ q_i) − ½ Σ_ij w_ij y_i·y_j over assignments y, where q is the model's softmax and w the affinity.
Deliberately different:
- the default affinity is kNN; the code's default is `rbf`, whose pull grows with the batch until one class takes all
  where labels are not correlated (see docs/methods/adaptation.md);
- no image is its own neighbour: in the code `rbf` and `linear` pull each image towards itself, and the kth neighbour
  that sets the bandwidth of `rbf` counts the image itself;
- affinities are symmetric, (W + Wᵀ)/2, without which there is no objective; an option of the code, off there;
- steps are damped by as much as W falls short of positive semi-definite, so that the objective never increases with
  any affinity; the fixed points are the same. Without it the published guarantee holds for `rbf` and `linear` alone;
- iterated in float64 until the assignments stand still; in the code until the objective changes by less than 1e-8.

Shapes: B images, C classes, D features.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.adaptation.base import Adapter, AdapterConfig
from deepclust.adaptation.classifier import Classifier
from deepclust.config import Count, config

Affinity = Literal["knn", "rbf", "linear"]


@config
class Config(AdapterConfig):
    """LAME's options."""

    affinity: Affinity = "knn"
    """How the pull between images depends on their features: `knn`, `rbf` or `linear`."""
    neighbours: Count | None = None
    """Nearest images that pull (`knn`) or set the bandwidth (`rbf`); None is 5, as published. `linear` has none."""

    def _check(self) -> None:
        if self.affinity == "linear" and self.neighbours is not None:
            raise ValueError(f"affinity 'linear' has no neighbours, got {self.neighbours}; make them null")


def affinity(features_BD: Tensor, *, kind: Affinity, neighbours: int) -> Tensor:
    """How much images pull each other: symmetric (B, B), float64, 0 for an image with itself.

    Args:
        features_BD: Features; compared by cosine, as unit vectors.
        kind: `knn`: 1 for the nearest ones; `rbf`: exp(−d²/2σ²) of the distance d; `linear`: the cosine.
        neighbours: How many are nearest; for `rbf` σ is the mean distance to the last of them; of no use to `linear`.
    """
    unit_BD = F.normalize(features_BD.double(), dim=1)
    product_BB = unit_BD @ unit_BD.T
    # On some processors the product of a matrix and its transpose is not symmetric to the last bit.
    cosines_BB = (product_BB + product_BB.T) / 2
    itself_BB = torch.eye(len(unit_BD), dtype=torch.bool, device=unit_BD.device)
    if kind == "linear" or len(unit_BD) == 1:
        return cosines_BB.masked_fill(itself_BB, 0)
    neighbours = min(neighbours, len(unit_BD) - 1)
    # Stable, so that of equal cosines the earlier image comes first. Cosines that ought to be equal, as of copies of an
    # image, may still differ in the last bit.
    ranked_BB = cosines_BB.masked_fill(itself_BB, -torch.inf).sort(dim=1, descending=True, stable=True)
    if kind == "knn":
        nearest_BB = torch.zeros_like(cosines_BB).scatter_(1, ranked_BB.indices[:, :neighbours], 1)
        return (nearest_BB + nearest_BB.T) / 2
    bandwidth = (2 - 2 * ranked_BB.values[:, neighbours - 1]).clamp(min=0).sqrt().mean()
    squares_BB = (2 - 2 * cosines_BB).clamp(min=0)
    weights_BB = torch.exp(-squares_BB / (2 * bandwidth.square()).clamp(min=torch.finfo(torch.float64).tiny))
    return ((weights_BB + weights_BB.T) / 2).masked_fill(itself_BB, 0)


def assign(logits_BC: Tensor, weights_BB: Tensor, *, tolerance: float = 1e-9, limit: int = 1000) -> Tensor:
    """Log assignments (B, C) in float64 at which the objective is stationary, downhill from the model's prediction.

    Each step minimises a bound of the objective: −½ yᵀWy is replaced by its tangent, plus c times the divergence from
    the present assignments, where −c is W's lowest eigenvalue if that is negative; c = 0 is the published step.

    Args:
        logits_BC: The model's logits.
        weights_BB: Symmetric affinities, float64.
        tolerance: The largest change of an assignment at which it stands still.
        limit: Most steps; if it is reached, the objective is lower than at the start and may fall further.
    """
    log_q_BC = logits_BC.double().log_softmax(dim=1)
    damping = -torch.linalg.eigvalsh(weights_BB)[0].clamp(max=0)
    log_y_BC = log_q_BC
    for _ in range(limit):
        pulled_BC = log_q_BC + weights_BB @ log_y_BC.exp()
        new_BC = ((pulled_BC + damping * log_y_BC) / (1 + damping)).log_softmax(dim=1)
        moved = (new_BC.exp() - log_y_BC.exp()).abs().max()
        log_y_BC = new_BC
        if moved < tolerance:
            break
    return log_y_BC


class LAME(Adapter):
    """Lets images that look alike to the model agree on their class; made for streams of correlated labels.

    A batch of one is predicted as the source model does. Nothing is learnt, so before and after, episodic or not, are
    the same.
    """

    name = "lame"
    config_class = Config
    frozen = True
    config: Config

    def _check_model(self, model: Classifier) -> None:
        model.check_head()

    @torch.no_grad()
    def _adapt(self, images: Tensor) -> Tensor:
        features_BD, logits_BC = self.model.outputs(images)
        pulls_BB = affinity(features_BD, kind=self.config.affinity, neighbours=self.config.neighbours or 5)
        return assign(logits_BC, pulls_BB).to(logits_BC)  # logarithms of the assignments
