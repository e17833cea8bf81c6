"""Ward's method on weighted points against SciPy and scikit-learn on the points themselves; cuts that are nested."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import linkage
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from deepclust.clustering import kmeans
from deepclust.clustering.tree import Tree, ward
from deepclust.errors import ConfigError
from deepclust.evaluation import metrics


def points(count: int = 120, dim: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def clustered(count: int = 300, k: int = 7) -> tuple[Tensor, Tensor]:
    data = points(count)
    return data, kmeans.fit(data, k, seed=0, iterations=20).assignments


def squared(data: Tensor, clusters: Tensor) -> float:
    """Sum of squared distances within clusters."""
    parts = [data[clusters == cluster].double() for cluster in clusters.unique()]
    return sum(float((part - part.mean(0)).square().sum()) for part in parts)


def test_wards_merges_of_single_points_are_scipys() -> None:
    data = points().double().numpy()
    merges, heights = ward(data, np.ones(len(data)))
    expected = linkage(data, "ward")
    assert (merges == np.sort(expected[:, :2].astype(int))).all()
    np.testing.assert_allclose(heights, expected[:, 2] ** 2 / 2, rtol=1e-9)


def test_a_weight_counts_as_so_many_copies_of_the_point() -> None:
    data = points(40).double().numpy()
    copies = np.random.default_rng(0).integers(1, 9, len(data))
    _, heights = ward(data, copies.astype(float))
    expected = linkage(np.repeat(data, copies, axis=0), "ward")
    np.testing.assert_allclose(heights, expected[-len(heights) :, 2] ** 2 / 2, rtol=1e-9)


def test_with_a_leaf_for_each_point_cuts_are_scikit_learns() -> None:
    data = points()
    tree = Tree.build(data, torch.zeros(len(data), dtype=torch.int64), seed=0, leaves=len(data))
    for count in (2, 3, 10, 50):
        expected = AgglomerativeClustering(count).fit_predict(data.numpy())
        assert metrics.ari(expected, tree.cut(count).clusters.numpy()) == 1


def test_the_given_clustering_is_a_cut() -> None:
    data, clusters = clustered()
    cut = Tree.build(data, clusters, seed=0, leaves=40).cut(7)
    assert torch.equal(cut.clusters, clusters)
    assert torch.equal(cut.sizes, torch.bincount(clusters))
    means = torch.stack([data[clusters == cluster].mean(0) for cluster in range(7)])
    torch.testing.assert_close(cut.centroids, means)


def test_every_cut_is_made_of_the_clusters_of_the_next() -> None:
    data, clusters = clustered()
    tree = Tree.build(data, clusters, seed=0, leaves=40)
    cuts = [tree.cut(count) for count in range(1, tree.leaves + 1)]
    for coarse, fine in pairwise(cuts):
        assert len(coarse.clusters.unique()) == len(coarse.sizes) == len(fine.sizes) - 1
        assert torch.equal(fine.parents(coarse)[fine.clusters], coarse.clusters)


def test_merges_add_ever_more_to_the_squared_distances_below_the_given_clusters_and_above() -> None:
    data, clusters = clustered()
    tree = Tree.build(data, clusters, seed=0, leaves=40)
    within = [squared(data, tree.cut(count).clusters) for count in range(tree.leaves, 0, -1)]
    added = np.diff(within)
    for part in (added[: tree.leaves - 7], added[tree.leaves - 7 :]):
        assert (np.diff(part) >= -1e-4 * part[1:]).all()


def test_new_points_go_to_the_nearest_leaf_of_their_cluster() -> None:
    data, clusters = clustered()
    tree = Tree.build(data, clusters, seed=0, leaves=40)
    new, theirs = points(50, seed=1), torch.randint(-1, 7, (50,), generator=torch.Generator().manual_seed(0))
    leaves = tree.assign(new, theirs)
    distances = torch.cdist(new.double(), tree.centroids.double())
    distances[theirs[:, None] != tree.given] = torch.inf
    assert torch.equal(leaves, torch.where(theirs < 0, -1, distances.argmin(1)))
    assert torch.equal(tree.cut(7).leaves[leaves[theirs >= 0]], theirs[theirs >= 0])


def test_points_without_a_cluster_have_none_in_any_cut() -> None:
    data, clusters = clustered()
    clusters[::3] = -1
    tree = Tree.build(data, clusters, seed=0, leaves=40)
    for count in (1, 3, 20):
        assert torch.equal(tree.cut(count).clusters < 0, clusters < 0)
        assert int(tree.cut(count).sizes.sum()) == int((clusters >= 0).sum())


def test_a_tree_is_the_same_every_time() -> None:
    data, clusters = clustered()
    one, again = (Tree.build(data, clusters, seed=3, leaves=40) for _ in range(2))
    for name in ("points", "centroids", "sizes", "given", "merges"):
        assert torch.equal(getattr(one, name), getattr(again, name))


def test_a_cluster_without_points_is_left_out_and_copies_make_fewer_leaves() -> None:
    data = torch.ones(30, 3)
    clusters = torch.arange(30) % 3 * 2  # none in 1 and 3
    tree = Tree.build(data, clusters, seed=0, leaves=9)
    assert (tree.k, tree.leaves) == (3, 3)
    assert torch.equal(tree.cut(3).clusters, clusters // 2)
    assert tree.assign(data[:2], torch.tensor([1, 2])).tolist() == [-1, 1]


def test_one_point_is_a_tree_of_one_leaf() -> None:
    tree = Tree.build(points(1), torch.zeros(1, dtype=torch.int64), seed=0)
    assert tree.cut(1).clusters.tolist() == [0]
    with pytest.raises(ConfigError, match="expected 1 to 1 clusters"):
        tree.cut(2)


def test_no_point_in_a_cluster_is_an_error_of_one_line() -> None:
    with pytest.raises(ConfigError, match="expected points in clusters"):
        Tree.build(points(3), torch.full((3,), -1), seed=0)
