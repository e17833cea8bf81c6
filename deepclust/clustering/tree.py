"""A tree of clusters, whose cuts at any number of clusters fit into each other and into a given clustering.

Ward's criterion (Hierarchical Grouping to Optimize an Objective Function, 1963), started from weighted centroids:
merging clusters of n and m points adds nm / (n + m) · ‖difference of their means‖² to the squared distances within
clusters, and the two that add least are merged.

Differences: the leaves are not the points but small clusters of them, made by k-means inside each of the given
clusters. Leaves are merged to the given clusters first, then those to the root, so that the given clustering is a cut.

N points, D dimensions, K given clusters, L leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor

from deepclust import seeding
from deepclust.clustering import base, kmeans
from deepclust.errors import ConfigError

LEAVES = 400  # that a tree has, and up to one more for each given cluster
_ITERATIONS = 20


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A number of clusters of the tree.

    Attributes:
        clusters: Cluster (N,) int64 of each point from 0; -1 of points that have none.
        leaves: Cluster (L,) int64 of each leaf.
        centroids: Means (n, D) float32 of the clusters.
        sizes: Points (n,) int64 of each.
    """

    clusters: Tensor
    leaves: Tensor
    centroids: Tensor
    sizes: Tensor

    def parents(self, coarser: Cut) -> Tensor:
        """The cluster (n,) int64 of a cut at fewer clusters that each of these is a part of."""
        found = torch.empty_like(self.sizes)
        found[self.leaves] = coarser.leaves
        return found


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Nested clusters of points.

    Leaves are numbered from 0 to L - 1, by their given cluster; the m-th merge makes node L + m.

    Attributes:
        points: Leaf (N,) int64 of each point; -1 of points without a cluster.
        centroids: Means (L, D) float32 of the leaves' points.
        sizes: Points (L,) int64 of each leaf.
        given: Given cluster (L,) int64 of each leaf.
        merges: The two nodes (L - 1, 2) int64 of each merge, the given clusters' own first.
        k: Number of given clusters that have points.
    """

    points: Tensor
    centroids: Tensor
    sizes: Tensor
    given: Tensor
    merges: Tensor
    k: int

    @classmethod
    def build(cls, points_ND: Tensor, clusters_N: Tensor, *, seed: int, leaves: int = LEAVES) -> Tree:
        """A tree of which a clustering is a cut.

        Args:
            points_ND: float32.
            clusters_N: The given cluster of each point; -1 of points that have none. Clusters may be empty.
            seed: Decides how k-means starts inside the clusters.
            leaves: At least how many leaves are made, in each cluster by its share of the points; fewer where there are
                copies.

        Raises:
            ConfigError: If no point has a cluster.
        """
        known = torch.unique(clusters_N[clusters_N >= 0]).tolist()
        if not known:
            raise ConfigError("expected points in clusters for a tree, got none; reject fewer")
        per_point = leaves / int((clusters_N >= 0).sum())
        assigned = torch.full_like(clusters_N, -1)
        given: list[int] = []
        for cluster in known:
            rows = (clusters_N == cluster).nonzero().flatten()
            parts = _split(points_ND[rows], math.ceil(per_point * len(rows)), seeding.derive(seed, "tree", cluster))
            assigned[rows] = parts + len(given)
            given += [cluster] * (int(parts.max()) + 1)
        centroids = base.means(points_ND, assigned, len(given))
        sizes = torch.bincount(assigned[assigned >= 0], minlength=len(given))
        merges = _merge(centroids, sizes, torch.tensor(given, device=points_ND.device))
        return cls(
            points=assigned,
            centroids=centroids,
            sizes=sizes,
            given=torch.tensor(given, device=points_ND.device),
            merges=merges,
            k=len(known),
        )

    @property
    def leaves(self) -> int:
        """Number of leaves, the most clusters that a cut has."""
        return len(self.sizes)

    def cut(self, count: int) -> Cut:
        """As many clusters, numbered by the first leaf in them; at `k` those that were given, in their order.

        Args:
            count: Number of clusters. Cuts at fewer are made of the clusters of cuts at more.

        Raises:
            ConfigError: If the tree has fewer leaves.
        """
        if not 1 <= count <= self.leaves:
            raise ConfigError(f"expected 1 to {self.leaves} clusters, as many as the tree has leaves; got {count}")
        names = self._names(self.leaves - count)
        _, ordered = torch.unique(names, return_inverse=True)  # the least leaf names a node, so in their order
        clusters = torch.where(self.points >= 0, ordered[self.points], -1)
        weights = self.sizes.double()
        sizes = torch.zeros(count, dtype=torch.int64, device=names.device).index_add_(0, ordered, self.sizes)
        sums = torch.zeros(count, self.centroids.shape[1], dtype=torch.float64, device=names.device)
        sums.index_add_(0, ordered, self.centroids.double() * weights[:, None])
        return Cut(
            clusters=clusters,
            leaves=ordered,
            centroids=(sums / sizes[:, None]).float(),
            sizes=sizes,
        )

    def assign(self, points_ND: Tensor, clusters_N: Tensor) -> Tensor:
        """The leaf (N,) int64 of new points: the nearest in the given cluster of each.

        `cut.leaves[...]` of it is a point's cluster in a cut.

        Args:
            points_ND: float32.
            clusters_N: The given cluster of each; -1 of points that have none, which have no leaf either. So have those
                of a cluster that no point of the tree had.
        """
        found = torch.full_like(clusters_N, -1)
        for cluster in torch.unique(self.given).tolist():
            rows = (clusters_N == cluster).nonzero().flatten()
            leaves = (self.given == cluster).nonzero().flatten()
            if len(rows):
                found[rows] = leaves[kmeans.assign(points_ND[rows], self.centroids[leaves])[0]]
        return found

    def _firsts(self) -> NDArray[np.int64]:
        """The least leaf of each node."""
        firsts = np.arange(2 * self.leaves - 1)
        for merge, pair in enumerate(self.merges.cpu().numpy()):
            firsts[self.leaves + merge] = firsts[pair].min()
        return firsts

    def _names(self, merges: int) -> Tensor:
        """The least leaf (L,) of the node that each leaf is in after so many merges."""
        firsts = self._firsts()
        above = np.arange(2 * self.leaves - 1)
        pairs = self.merges.cpu().numpy()
        for merge in reversed(range(merges)):
            above[pairs[merge]] = above[self.leaves + merge]
        return torch.from_numpy(firsts[above[: self.leaves]]).to(self.merges.device)


def ward(
    centroids_ND: NDArray[np.float64], sizes_N: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ward's hierarchy of weighted points; of equal merges that of the first.

    Args:
        centroids_ND: Means of the clusters to start from.
        sizes_N: How many points each stands for.

    Returns:
        The two nodes (N - 1, 2) of each merge, numbered as in SciPy, the smaller first; and what each merge (N - 1,)
        adds to the sum of squared distances, never falling.
    """
    count = len(centroids_ND)
    centroids, sizes, nodes = centroids_ND.copy(), sizes_N.copy(), np.arange(count)
    costs = cdist(centroids, centroids, "sqeuclidean") * (sizes[:, None] * sizes / (sizes[:, None] + sizes))
    np.fill_diagonal(costs, np.inf)
    merges, heights = np.zeros((count - 1, 2), dtype=np.int64), np.zeros(count - 1)
    for merge in range(count - 1):
        one, other = sorted(divmod(int(costs.argmin()), count))
        merges[merge], heights[merge] = sorted((nodes[one], nodes[other])), costs[one, other]
        both = sizes[one] + sizes[other]
        centroids[one] = (sizes[one] * centroids[one] + sizes[other] * centroids[other]) / both
        sizes[one], nodes[one] = both, count + merge
        costs[other], costs[:, other] = np.inf, np.inf
        added = cdist(centroids[one][None], centroids, "sqeuclidean")[0] * (both * sizes / (both + sizes))
        costs[one] = costs[:, one] = np.where(np.isinf(costs[one]), np.inf, added)
    return merges, np.maximum.accumulate(heights)  # rounding may let one fall


def _split(points: Tensor, count: int, seed: int) -> Tensor:
    """Parts (N,) of points, about `count`; fewer where there are copies."""
    if count >= len(points):
        return torch.arange(len(points), device=points.device)
    found = kmeans.fit(points, count, seed=seed, iterations=_ITERATIONS)
    parts: Tensor = torch.unique(found.assignments, return_inverse=True)[1]
    return parts


def _merge(centroids: Tensor, sizes: Tensor, given: Tensor) -> Tensor:
    """Merges of the leaves up to the given clusters, by height, then of those."""
    means, weights, owners = centroids.cpu().double().numpy(), sizes.cpu().double().numpy(), given.cpu().numpy()
    count = len(means)
    inside: list[tuple[float, int, int]] = []  # height, given cluster, and which of its merges
    trees: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # leaves and merges of each given cluster
    for number, owner in enumerate(np.unique(owners)):
        leaves = (owners == owner).nonzero()[0]
        merges, heights = ward(means[leaves], weights[leaves])
        trees.append((leaves, merges))
        inside += [(float(height), number, merge) for merge, height in enumerate(heights)]
    nodes = [[*leaves.tolist()] for leaves, _ in trees]  # of a given cluster's nodes, the numbers in the whole tree
    found: list[list[int]] = []
    for _, number, merge in sorted(inside):
        found.append([nodes[number][node] for node in trees[number][1][merge]])
        nodes[number].append(count + len(found) - 1)
    roots = [own[-1] for own in nodes]
    totals = np.array([weights[leaves].sum() for leaves, _ in trees])
    tops = np.stack([weights[leaves] @ means[leaves] for leaves, _ in trees]) / totals[:, None]
    merges, _ = ward(tops, totals)
    below = count - len(trees)
    found += [
        [roots[node] if node < len(trees) else count + below + node - len(trees) for node in pair] for pair in merges
    ]
    return torch.tensor(found, dtype=torch.int64, device=centroids.device).view(-1, 2)
