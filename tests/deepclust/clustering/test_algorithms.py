"""The classics against scikit-learn on blobs, and what poor inputs get."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, KMeans, SpectralClustering
from sklearn.mixture import GaussianMixture
from torch import Tensor

from deepclust.clustering import algorithms, base, plane
from deepclust.clustering.algorithms import gmm, hdbscan, spectral, ward
from deepclust.clustering.assigners import Assigner, load
from deepclust.clustering.base import Points, Problem
from deepclust.errors import ConfigError
from deepclust.evaluation import metrics

CLASSICS = ("gmm", "hdbscan", "kmeans", "spectral", "ward")


def blobs(k: int = 5, count: int = 200, noise: float = 0.2, seed: int = 0) -> Tensor:
    """Of each class every k-th."""
    centres = 2 * torch.randn(k, 12, generator=torch.Generator().manual_seed(0))
    return centres[torch.arange(count) % k] + noise * torch.randn(
        count, 12, generator=torch.Generator().manual_seed(seed)
    )


def fit(name: str, data: Tensor, k: int, seed: int = 0, **options: Any) -> Assigner:
    problem = Problem(points=Points(data), k=k, seed=seed)
    return algorithms.fit(name, problem, algorithms.config_class(name)(**options))


def agree(one: Any, other: Any) -> bool:
    return metrics.ari(np.asarray(one), np.asarray(other)) == 1


@pytest.mark.parametrize("name", CLASSICS)
def test_blobs_are_found_and_new_points_go_to_theirs(name: str) -> None:
    data, new = blobs(count=100), blobs(count=100, seed=1)
    found = fit(name, data, 5)
    assert found.k == 5
    assert agree(found.assign(data), torch.arange(100) % 5)
    assert torch.equal(found.assign(data), found.assign(new))
    probabilities = found.probabilities(new)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(100))
    assert (probabilities.amax(1) > 0.9).all()


@pytest.mark.parametrize("name", CLASSICS)
def test_a_fit_is_the_same_every_time_and_after_saving(name: str) -> None:
    data = blobs(count=80, noise=1.0)
    one, again = (fit(name, data, 5, seed=3) for _ in range(2))
    for key, tensor in one.state().items():
        assert torch.equal(tensor, again.state()[key])
    restored = load(one.kind, one.state(), k=one.k, dim=12)
    assert torch.equal(restored.probabilities(data), one.probabilities(data))


def test_kmeans_ends_where_scikit_learns_best_run_ends() -> None:
    data = blobs(noise=0.8)
    expected = KMeans(5, n_init=10, random_state=0).fit(data.numpy())
    assert agree(fit("kmeans", data, 5).assign(data), expected.labels_)


def test_spectral_clusters_are_scikit_learns_on_the_same_graph() -> None:
    data = blobs(noise=0.6)
    points, options = Points(data), spectral.Config(neighbours=60, regularisation=1e-9)
    graph = points.graph(60)  # more than a blob has, so that all hangs together
    expected = SpectralClustering(5, affinity="precomputed", random_state=0).fit_predict(
        spectral.adjacency(graph).toarray()
    )
    assert agree(spectral.cluster(spectral.embedded(points, 5, options), 0), expected)


def test_a_mixture_is_scikit_learns_from_the_same_start() -> None:
    data = blobs(noise=0.8)
    found = fit("gmm", data, 5, floor=1e-9, iterations=1000)
    assert isinstance(found, gmm.Gaussians)
    points = data.double().numpy()
    expected = GaussianMixture(
        5, covariance_type="diag", reg_covar=0.0, max_iter=1000, means_init=found.means.double().numpy(), random_state=0
    ).fit(points)
    np.testing.assert_allclose(found.means, expected.means_, atol=0.02)
    np.testing.assert_allclose(found.variances, expected.covariances_, rtol=0.05)
    np.testing.assert_allclose(found.log_weights.exp(), expected.weights_, atol=5e-3)
    np.testing.assert_allclose(found.probabilities(data), expected.predict_proba(points), atol=0.05)


def test_the_floor_of_a_mixture_is_a_share_of_each_features_variance() -> None:
    data = torch.cat([blobs(noise=0.0), 1000 * blobs(noise=0.0)], 1)  # every cluster is one point
    found = fit("gmm", data, 5, floor=0.25)
    expected = 0.25 * data.double().var(0, correction=0).float().expand(5, -1)
    torch.testing.assert_close(found.state()["variances"], expected)


def test_hdbscan_says_what_scikit_learn_finds_in_the_plane_and_noise_is_not_learned() -> None:
    data = torch.cat([blobs(3, 150), 4 * blobs(1, 10, noise=3.0, seed=2)])
    flat = plane.flatten(data, perplexity=30.0)
    expected = HDBSCAN(min_cluster_size=12, min_samples=15, cluster_selection_method="leaf", copy=True).fit_predict(
        flat
    )
    found = fit("hdbscan", data, 9, least=12)
    assert found.k == expected.max() + 1 != 9  # its own number
    known = expected >= 0
    assert agree(found.assign(data)[known], expected[known])


def test_hdbscan_calls_noise_alone_one_cluster() -> None:
    data = blobs(1, 40, noise=1.0)
    found = fit("hdbscan", data, 2, least=30)
    assert found.k == 1
    torch.testing.assert_close(found.state()["centroids"], data.mean(0, keepdim=True))
    assert (found.assign(data) == 0).all()


def test_wards_clusters_are_scikit_learns_on_all_pairs() -> None:
    data = blobs(8, 160, noise=0.5)
    unit = torch.nn.functional.normalize(data, dim=1).numpy()
    for k in (4, 8):  # four: the order of merges counts
        assert agree(fit("ward", data, k, neighbours=159).assign(data), AgglomerativeClustering(k).fit_predict(unit))


def test_wards_clusters_hang_together_though_the_graph_does_not() -> None:
    found = fit("ward", blobs(5, 100, noise=0.01), 3, neighbours=3)  # at least five parts
    assert len(found.assign(blobs(5, 100, noise=0.01)).unique()) == 3


@pytest.mark.parametrize("name", ["gmm", "hdbscan", "ward"])
def test_a_sample_stands_for_more_points(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr({"gmm": gmm, "hdbscan": hdbscan, "ward": ward}[name], "_MOST", 100)
    data = blobs(5, 400)
    found = fit(name, data, 5)
    assert agree(found.assign(data), torch.arange(400) % 5)


@pytest.mark.parametrize("name", CLASSICS)
@pytest.mark.parametrize(
    ("data", "k"),
    [
        (torch.ones(30, 4), 3),
        (torch.zeros(30, 4), 3),
        (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 2),
        (blobs(3, 6), 6),
        (blobs(2, 30, noise=0.0), 4),
        (torch.linspace(1, 2, 20)[:, None], 3),
    ],
    ids=["equal", "zero", "two", "k points", "copies", "one dimension"],
)
def test_poor_points_have_clusters_and_finite_probabilities(name: str, data: Tensor, k: int) -> None:
    found = fit(name, data, k)
    assert 1 <= found.k <= k
    clusters, probabilities = found.assign(data), found.probabilities(data)
    assert 0 <= clusters.min() <= clusters.max() < found.k
    assert probabilities.isfinite().all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(data)))


def test_an_unknown_algorithm_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean hdbscan"):
        algorithms.config_class("hdbscn")


def test_means_of_clusters_leave_out_points_without_one() -> None:
    found = base.means(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([0, 0, -1]), 2)
    assert found[0].item() == 2
    assert found[1].isnan()


def test_spectral_clustering_draws_arpacks_restarts_from_its_seed_and_samples_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    same = torch.ones(30, 3)  # a space that is exhausted at once
    options = spectral.Config()
    found = [spectral.fit(Problem(points=Points(same), k=3, seed=0), options).assign(same) for _ in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    data = blobs(3, 120)
    monkeypatch.setattr(spectral, "_MOST_NUMBERS", 23 * 60)
    few = []
    monkeypatch.setattr(
        spectral, "embedded", lambda part, *rest, do=spectral.embedded: few.append(part) or do(part, *rest)
    )
    clusters = spectral.fit(Problem(points=Points(data), k=3, seed=0), options).assign(data)
    assert len(few[0]) == 60
    assert metrics.ari((torch.arange(120) % 3).numpy(), clusters.numpy()) == 1
