"""Fitted clusters with what says how sure they are of a point: applied, saved and read.

A folder of clusters holds

    cluster.json          what they are
    centroids.npy         the mean of each cluster's training points
    clusters.safetensors  the assigner, its refits and some training points; folders of earlier versions lack it

N points, D dimensions, K clusters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust import files
from deepclust.clustering import assigners
from deepclust.clustering.assigners import Assigner, Centroids
from deepclust.config import Count, Flag, Natural, NotNegative, Number
from deepclust.errors import CheckpointError
from deepclust.models import weights

DESCRIPTION, CENTROIDS, ASSIGNERS = "cluster.json", "centroids.npy", "clusters.safetensors"
NONE = -1  # the cluster of what belongs to none
_ROWS = 1 << 13  # points that are judged at once
_NEIGHBOURS = 16
_COPY = 1 - 1e-5  # cosine from which a training point is the point itself, or a copy of it


class Refit(NamedTuple):
    """The same algorithm fitted with another seed.

    Attributes:
        assigner: Of as many clusters.
        matching: (K,) int64, its cluster for each of ours.
    """

    assigner: Assigner
    matching: Tensor


class Judged(NamedTuple):
    """The clusters of N points, and how sure they are.

    Attributes:
        clusters: (N,) int64, the most probable, whether it is rejected or not.
        distances: (N,) float32, Euclidean distance to the cluster's centroid.
        margins: (N,) float32, its probability less that of the next, from 0 to 1.
        agreements: (N,) float32, share of the refits that say the same; NaN without refits.
        neighbours: (N,) float32, share of the nearest points of the bank that are in the cluster, copies of the point
            left out; NaN without a bank.
        scores: (N,) float32 from 0 to 1, what decides on rejection: the mean of two, the mean probability that the
            assigner and its refits give to the cluster and the neighbours' share; times reach / distance beyond the
            reach.
    """

    clusters: Tensor
    distances: Tensor
    margins: Tensor
    agreements: Tensor
    neighbours: Tensor
    scores: Tensor


class Bank(NamedTuple):
    """Some of the training points, whose clusters are a point's neighbours' say.

    Attributes:
        points: (B, D) float32, of unit length.
        clusters: (B,) int64.
    """

    points: Tensor
    clusters: Tensor


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Fitted clusters, as `confidence.fit` makes them.

    Attributes:
        assigner: Says which cluster.
        centroids: (K, D) float32, the means of the clusters' training points.
        reach: Distance to the centroid within which nearly all training points lie.
        normalise: Whether features are brought to unit length first.
        algorithm: Its name.
        refits: Fits with other seeds.
        bank: Some of the training points.
        reject: Points of a lower score have no cluster; None: all have.
    """

    assigner: Assigner
    centroids: Tensor
    reach: float
    normalise: bool
    algorithm: str
    refits: Sequence[Refit] = ()
    bank: Bank | None = None
    reject: float | None = None

    @property
    def k(self) -> int:
        """Number of clusters."""
        return self.assigner.k

    def points(self, features_ND: Tensor) -> Tensor:
        """What `judge` takes of features as the encoder gives them."""
        return F.normalize(features_ND, dim=1) if self.normalise else features_ND

    def judge(self, points_ND: Tensor) -> Judged:
        """The cluster of each point, and how sure."""
        parts = [self._judge(rows) for rows in torch.split(points_ND, _ROWS)]
        return Judged(*map(torch.cat, zip(*parts, strict=True)))

    def kept(self, judged: Judged) -> Tensor:
        """The clusters (N,) int64, -1 of what is rejected."""
        return judged.clusters if self.reject is None else judged.clusters.where(judged.scores >= self.reject, NONE)

    def _judge(self, points: Tensor) -> Judged:
        logits = self.assigner.logits(points)
        clusters, chances = logits.argmax(dim=1), logits.softmax(1)
        own = chances.gather(1, clusters[:, None])[:, 0]
        second = chances.scatter(1, clusters[:, None], 0).amax(1)
        given, same = [own], []
        for refit, matching in self.refits:
            logits, wanted = refit.logits(points), matching[clusters]
            given.append(logits.softmax(1).gather(1, wanted[:, None])[:, 0])
            same.append(logits.argmax(dim=1) == wanted)
        distances = (points.double() - self.centroids[clusters].double()).norm(dim=1).float()
        agreements = torch.stack(same).float().mean(0) if same else torch.full_like(own, torch.nan)
        chance, neighbours = torch.stack(given).mean(0), torch.full_like(own, torch.nan)
        if self.bank:
            neighbours = _neighbours(points, clusters, self.bank)
            chance = (chance + neighbours) / 2
        scores = within_reach(chance, distances, self.reach)
        return Judged(clusters, distances, own - second, agreements, neighbours, scores)

    def save(self, folder: Path) -> None:
        """Write the files into an existing folder."""
        description: dict[str, Any] = {"k": self.k, "normalise": self.normalise, "algorithm": self.algorithm}
        description |= {"kind": self.assigner.kind, "reach": self.reach, "reject": self.reject}
        text = json.dumps(description | {"refits": len(self.refits)}, indent=2) + "\n"
        (folder / DESCRIPTION).write_text(text, encoding="utf-8")
        files.write_array(folder / CENTROIDS, self.centroids.cpu().numpy())
        tensors = {f"assigner.{name}": tensor for name, tensor in self.assigner.state().items()}
        for number, (refit, matching) in enumerate(self.refits):
            tensors |= {f"refit.{number}.{name}": tensor for name, tensor in refit.state().items()}
            tensors[f"matching.{number}"] = matching
        if self.bank:
            tensors |= {f"bank.{name}": tensor for name, tensor in self.bank._asdict().items()}
        copies = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        weights.save(copies, folder / ASSIGNERS)


def _neighbours(points: Tensor, clusters: Tensor, bank: Bank) -> Tensor:
    count = min(_NEIGHBOURS, len(bank.points))
    similarities, nearest = (F.normalize(points, dim=1) @ bank.points.T).topk(count, dim=1)
    others = similarities < _COPY
    same = others & (bank.clusters[nearest] == clusters[:, None])
    return torch.where(others.any(1), same.sum(1) / others.sum(1), 1.0)  # of copies alone nothing is known


def within_reach(chances_N: Tensor, distances_N: Tensor, reach: float) -> Tensor:
    """Scores (N,) of mean probabilities: less by reach / distance beyond the reach."""
    return chances_N * torch.where(distances_N > reach, reach / distances_N, 1.0)


def nearest(centroids_KD: Tensor, *, normalise: bool) -> Clusters:
    """The nearest of centroids of which nothing else is known, so that nothing is rejected.

    The mean squared distance of a centroid to the next one stands in for that of training points.
    """
    squared = torch.cdist(centroids_KD.double(), centroids_KD.double()).square().fill_diagonal_(torch.inf)
    scale = float(squared.amin(1).mean()) if len(centroids_KD) > 1 else 0.0
    far = torch.finfo(torch.float32).max
    assigner = Centroids(centroids_KD, scale or 1.0)
    return Clusters(assigner=assigner, centroids=centroids_KD, reach=far, normalise=normalise, algorithm="kmeans")


def load(folder: Path, feature_dim: int) -> Clusters:
    """Read the clusters of a folder; of those that have no assigner yet the nearest centroid.

    Args:
        folder: Where they were saved.
        feature_dim: Dimension of the features that they must be of.

    Raises:
        CheckpointError: If they are missing, damaged, or were made for features of another dimension.
    """
    try:
        description = files.record(folder / DESCRIPTION, {"k": Count, "normalise": Flag}, {"kind": str})
        centroids = files.array(folder / CENTROIDS, (description["k"], None), np.float32, finite=True)
        fitted = _fitted(folder, centroids.shape[1]) if "kind" in description else {}
    except CheckpointError as error:
        raise CheckpointError(f"{error}; run its cluster stage") from error
    if centroids.shape[1] != feature_dim:
        raise CheckpointError(
            f"expected centroids (clusters, {feature_dim}) in {folder}, got {centroids.shape}; they belong to "
            "another encoder: run its embed and cluster stages again"
        )
    made = nearest(torch.from_numpy(np.array(centroids)), normalise=description["normalise"])
    return replace(made, **fitted)


def _fitted(folder: Path, dim: int) -> dict[str, Any]:
    """What a folder says beyond centroids, by the names of `Clusters`."""
    stated = {"algorithm": str, "reach": NotNegative, "reject": Number | None}
    description = files.record(folder / DESCRIPTION, {"k": Count, "kind": str, "refits": Natural, **stated})
    tensors, k = weights.load(folder / ASSIGNERS), description["k"]

    def assigner(part: str) -> Assigner:
        state = {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        return assigners.load(description["kind"], state, k=k, dim=dim)

    def numbers(name: str, count: int) -> Tensor:
        found = tensors.get(name, torch.empty(0))
        if found.shape != (count,) or found.dtype != torch.int64 or not ((found >= 0) & (found < k)).all():
            raise CheckpointError(f"expected {count} numbers of clusters as {name}")
        return found

    def bank() -> Bank | None:
        points = tensors.get("bank.points")
        if points is None:
            return None
        if points.ndim != 2 or not len(points) or points.shape[1] != dim or points.dtype != torch.float32:
            raise CheckpointError(f"expected points of {dim} features as bank.points, got {(*points.shape,)}")
        return Bank(points, numbers("bank.clusters", len(points)))

    try:
        refits = [
            Refit(assigner(f"refit.{number}."), numbers(f"matching.{number}", k))
            for number in range(description["refits"])
        ]
        found = {"assigner": assigner("assigner."), "refits": refits, "bank": bank()}
    except CheckpointError as error:
        raise CheckpointError(f"{folder / ASSIGNERS} is damaged: {error}") from error
    return {name: description[name] for name in stated} | found
