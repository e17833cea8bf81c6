"""What assigns points to clusters once an algorithm is fitted: a few kinds, saved as tensors with a name.

N points, D dimensions, K clusters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.clustering import kmeans
from deepclust.errors import CheckpointError
from deepclust.evaluation import probing

_DECAY, _ITERATIONS = 3e-2, 100  # of the classifier that learns what a graph method found
_DIRECT = "donot_use_mm_for_euclid_dist"  # the expanded square loses the distances of points close to their centroid
_ROWS = 1 << 13  # points whose probabilities are computed at once


class Assigner(ABC):
    """Fitted clusters of points.

    Attributes:
        kind: The name by which it is saved.
        k: Number of clusters.
    """

    kind: ClassVar[str]
    k: int

    @abstractmethod
    def logits(self, points_ND: Tensor) -> Tensor:
        """Unnormalised log-probabilities (N, K) float32 of the clusters."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors of which `load` makes the same again."""

    def probabilities(self, points_ND: Tensor) -> Tensor:
        """Probabilities (N, K) float32 of the clusters; the rows sum to 1."""
        found = points_ND.new_empty(len(points_ND), self.k)
        for rows, part in zip(torch.split(points_ND, _ROWS), torch.split(found, _ROWS), strict=True):
            part.copy_(self.logits(rows).softmax(dim=1))
        return found

    def assign(self, points_ND: Tensor) -> Tensor:
        """The most probable cluster (N,) int64 of each point, of equally probable ones the first."""
        found = torch.empty(len(points_ND), dtype=torch.int64, device=points_ND.device)
        for rows, part in zip(torch.split(points_ND, _ROWS), torch.split(found, _ROWS), strict=True):
            part.copy_(self.logits(rows).argmax(dim=1))  # of equals the first
        return found


class Centroids(Assigner):
    """The nearest centroid; logits are -‖x - c‖² / scale.

    Args:
        centroids_KD: float32.
        scale: Mean squared distance of training points to their centroids, so that probabilities do not depend on the
            features' scale.
    """

    kind = "centroids"

    def __init__(self, centroids_KD: Tensor, scale: float) -> None:
        self.centroids, self.scale, self.k = centroids_KD, scale, len(centroids_KD)

    @classmethod
    def of(cls, centroids_KD: Tensor, points_ND: Tensor) -> Centroids:
        """With the scale that training points give; 1 where each of them is a centroid."""
        _, squared = kmeans.assign(points_ND, centroids_KD)
        return cls(centroids_KD, float(squared.mean(dtype=torch.float64)) or 1.0)

    def logits(self, points_ND: Tensor) -> Tensor:
        squared = torch.cdist(points_ND.double(), self.centroids.double(), compute_mode=_DIRECT).square()
        return (-squared / self.scale).float()

    def assign(self, points_ND: Tensor) -> Tensor:
        return kmeans.assign(points_ND, self.centroids)[0]

    def state(self) -> dict[str, Tensor]:
        return {"centroids": self.centroids, "scale": torch.tensor(self.scale, dtype=torch.float64)}


class Layers(Assigner):
    """A head of linear layers with ReLU between them; a single layer is a linear classifier.

    Args:
        layers: Weight (out, in) and bias (out,) of each layer, float32.
        unit: Whether points are brought to unit length first.
    """

    kind = "layers"

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], *, unit: bool = False) -> None:
        self.layers, self.unit, self.k = [*layers], unit, len(layers[-1][1])

    def logits(self, points_ND: Tensor) -> Tensor:
        hidden = F.normalize(points_ND, dim=1) if self.unit else points_ND
        for number, (weight, bias) in enumerate(self.layers):
            hidden = F.linear(hidden.relu() if number else hidden, weight, bias)
        return hidden

    def state(self) -> dict[str, Tensor]:
        named = {
            f"{number}.{name}": tensor
            for number, layer in enumerate(self.layers)
            for name, tensor in zip(("weight", "bias"), layer, strict=True)
        }
        return named | {"unit": torch.tensor(self.unit)}


class StudentT(Assigner):
    """Student's t distributions around centroids in a linear embedding of points of unit length.

    Args:
        weight_RD: Of the embedding, float32.
        bias_R: Of the embedding, float32.
        centroids_KR: In the embedding, float32; logits are -log(1 + ‖z - μ‖²).
    """

    kind = "student_t"

    def __init__(self, weight_RD: Tensor, bias_R: Tensor, centroids_KR: Tensor) -> None:
        self.weight, self.bias, self.centroids, self.k = weight_RD, bias_R, centroids_KR, len(centroids_KR)

    def logits(self, points_ND: Tensor) -> Tensor:
        embedded = F.linear(F.normalize(points_ND, dim=1), self.weight, self.bias)
        return -torch.cdist(embedded, self.centroids, compute_mode=_DIRECT).square().log1p()

    def state(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias, "centroids": self.centroids}


class Gaussians(Assigner):
    """A mixture of Gaussians of diagonal covariance; probabilities are the responsibilities.

    Args:
        means_KD: float32.
        variances_KD: float32, positive.
        log_weights_K: float32, logarithms of the mixture's weights.
    """

    kind = "gaussians"

    def __init__(self, means_KD: Tensor, variances_KD: Tensor, log_weights_K: Tensor) -> None:
        self.means, self.variances, self.log_weights = means_KD, variances_KD, log_weights_K
        self.k = len(means_KD)

    def logits(self, points_ND: Tensor) -> Tensor:
        inverse = 1 / self.variances.double()
        points, means = points_ND.double(), self.means.double()
        squared = (
            points.square() @ inverse.T - 2 * points @ (means * inverse).T + (means.square() * inverse).sum(1)
        ).clamp_(min=0)
        constant = self.log_weights.double() - self.variances.double().log().sum(1) / 2
        return (constant - squared / 2).float()

    def state(self) -> dict[str, Tensor]:
        return {"means": self.means, "variances": self.variances, "log_weights": self.log_weights}


def load(kind: str, state: Mapping[str, Tensor], *, k: int, dim: int) -> Assigner:
    """The assigner that was saved.

    Args:
        kind: Its `kind`.
        state: Its `state()`.
        k: Number of clusters that it must have.
        dim: Number of dimensions that its points must have.

    Raises:
        CheckpointError: If the tensors are not those of such an assigner.
    """
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    row, rows = ((k,), torch.float32), ((k, dim), torch.float32)
    if kind == Centroids.kind and shapes == {"centroids": rows, "scale": ((), torch.float64)}:
        return Centroids(state["centroids"], float(state["scale"]))
    if kind == Gaussians.kind and shapes == {"means": rows, "variances": rows, "log_weights": row}:
        return Gaussians(state["means"], state["variances"], state["log_weights"])
    if kind == StudentT.kind and len(embedded := shapes.get("bias", ((), None))[0]) == 1:
        wanted = {"weight": (*embedded, dim), "bias": embedded, "centroids": (k, *embedded)}
        if shapes == {name: (shape, torch.float32) for name, shape in wanted.items()}:
            return StudentT(state["weight"], state["bias"], state["centroids"])
    if kind == Layers.kind and shapes.pop("unit", None) == ((), torch.bool):
        layers, width = [], dim
        for number in range(len(shapes) // 2):
            weight, bias = (state.get(f"{number}.{name}", torch.empty(0)) for name in ("weight", "bias"))
            if weight.shape != (len(bias), width) or {weight.dtype, bias.dtype} != {torch.float32}:
                break
            layers.append((weight, bias))
            width = len(bias)
        if layers and 2 * len(layers) == len(shapes) and width == k:
            return Layers(layers, unit=bool(state["unit"]))
    told = ", ".join(f"{name} {shape}" for name, (shape, _) in sorted(shapes.items()))
    raise CheckpointError(f"expected the {kind} of {k} clusters of {dim} features, got {told}")


def classifier(points_ND: Tensor, clusters_N: Tensor, k: int) -> Layers:
    """A linear classifier on clusters that a method found without giving a rule for new points.

    Args:
        points_ND: float32 training points.
        clusters_N: The cluster of each, from 0; -1 of what belongs to none, from which nothing is learned.
        k: Number of clusters.
    """
    known = clusters_N >= 0
    if not known.all():  # else no copy is needed
        points_ND, clusters_N = points_ND[known], clusters_N[known]
    (found,) = probing.fit_linear(points_ND, clusters_N, classes=k, weight_decays=[_DECAY], iterations=_ITERATIONS)
    return Layers([(found.weight, found.bias)])
