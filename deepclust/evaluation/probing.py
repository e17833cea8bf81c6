"""What frozen features are worth: weighted kNN and a linear classifier.

N training items, M queries, D feature dimension, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.errors import DataError

_CHUNK = 1024  # queries at once: memory is this times N, never M times N


@torch.inference_mode()
def knn(
    bank_ND: Tensor,
    labels_N: Tensor,
    queries_MD: Tensor,
    *,
    classes: int,
    neighbours: Sequence[int],
    temperatures: Sequence[float],
) -> dict[tuple[int, float], Tensor]:
    """Classes by a vote of the k most similar items, weighted by exp(cosine / τ) (Wu et al., arXiv 1805.01978).

    Args:
        bank_ND: Training features.
        labels_N: Their classes.
        queries_MD: Features to classify.
        classes: Number of classes.
        neighbours: Values of k; a k larger than N is taken as N.
        temperatures: Values of τ.

    Returns:
        Predicted classes (M,) for every (k, τ).
    """
    bank = F.normalize(bank_ND.float(), dim=1)
    queries = F.normalize(queries_MD.float(), dim=1)
    largest = min(max(neighbours), len(bank))
    predictions: dict[tuple[int, float], list[Tensor]] = {(k, t): [] for k in neighbours for t in temperatures}
    for chunk in torch.split(queries, _CHUNK):
        similarity, nearest = (chunk @ bank.T).topk(largest, dim=1)
        voters = labels_N[nearest]
        for k, temperature in predictions:
            # Relative to the nearest: the same vote, and no overflow at a small temperature.
            weight = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()
            votes = torch.zeros(len(chunk), classes, device=chunk.device).scatter_add_(1, voters[:, :k], weight)
            predictions[k, temperature].append(votes.argmax(1))
    return {key: torch.cat(parts) for key, parts in predictions.items()}


@dataclass(frozen=True)
class LinearClassifier:
    """Logits are `features @ weight.T + bias`, on features as the encoder gives them."""

    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Classes (M,) of features (M, D)."""
        return (features @ self.weight.T + self.bias).argmax(1)


def fit_linear(
    features_ND: Tensor,
    labels_N: Tensor,
    *,
    classes: int,
    weight_decays: Sequence[float],
    iterations: int,
) -> list[LinearClassifier]:
    """Multinomial logistic regression by L-BFGS, one classifier for each weight decay.

    The features are standardised for the fit, and the scaling is folded into the weights. The objective, mean
    cross-entropy + decay / 2 · ‖W‖², is convex; the fits run from the largest decay down, each from the last.

    Args:
        features_ND: Training features.
        labels_N: Their classes, 0..C-1.
        classes: Number of classes.
        weight_decays: Strengths of the penalty.
        iterations: L-BFGS iterations of a fit.

    Returns:
        Classifiers in the order of `weight_decays`.

    Raises:
        DataError: If there is no labelled item.
    """
    if len(labels_N) == 0:
        raise DataError("expected labelled items for a linear classifier, got none; label some training images")
    mean = features_ND.mean(0)
    std = features_ND.std(0, correction=0)
    scale = torch.where(std > 1e-6 * std.max(), 1 / std.clamp(min=torch.finfo(std.dtype).tiny), 0.0)
    standard = (features_ND - mean) * scale
    weight = torch.zeros(classes, features_ND.shape[1], device=features_ND.device, requires_grad=True)
    bias = torch.zeros(classes, device=features_ND.device, requires_grad=True)
    fitted: dict[float, LinearClassifier] = {}
    for decay in sorted(set(weight_decays), reverse=True):
        _minimise(standard, labels_N, weight, bias, decay, iterations)
        raw = weight.detach() * scale
        fitted[decay] = LinearClassifier(raw, bias.detach() - raw @ mean)
    return [fitted[decay] for decay in weight_decays]


def _minimise(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, decay: float, iterations: int) -> None:
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
