"""The number of clusters of blobs that are known, and what poor inputs get."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from deepclust.clustering import how_many, plane
from deepclust.evaluation import metrics

SMALL = how_many.Config(images=100, subsamples=3, perplexity=10.0, most=12)
TINY = how_many.Config(images=40, subsamples=2, perplexity=5.0, most=6)


def blobs(k: int, count: int = 240, noise: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, 16, generator=generator)
    return centres[torch.arange(count) % k] + noise * torch.randn(count, 16, generator=generator)


@pytest.fixture(scope="module")
def six() -> how_many.Estimate:
    return how_many.estimate(blobs(6), SMALL, seed=0)


def test_blobs_are_counted_and_every_subsample_says_so(six: how_many.Estimate) -> None:
    assert (six.k, six.sure, six.interval, six.edge, six.reason) == (6, 1.0, (6, 6), "", "")
    assert six.alone == (6, 6, 6)


def test_the_table_holds_the_range_and_the_estimate_is_its_best(six: how_many.Estimate) -> None:
    assert [row.k for row in six.table] == list(range(2, 13))
    best = max(six.table, key=lambda row: row.score)
    assert best.k == six.k
    assert best.stability == pytest.approx(1)
    for row in six.table:
        assert row.score == pytest.approx(row.silhouette * row.stability**0.5)


def test_runners_up_are_others_than_the_estimate_and_than_each_other(six: how_many.Estimate) -> None:
    assert len(six.runners_up) == 3
    assert list(six.runners_up) == sorted(six.runners_up, key=lambda row: -row.score)
    named = [six.k, *(row.k for row in six.runners_up)]
    assert all(abs(later - first) > 0.15 * first for first, later in combinations(named, 2))
    assert six.runners_up[0].score == max(row.score for row in six.table if row.k != six.k)


def test_an_estimate_is_the_same_every_time_and_follows_the_seed() -> None:
    one, again, other = (how_many.estimate(blobs(3, noise=1.0), TINY, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one.table != other.table


def test_the_ends_of_the_range_are_said() -> None:
    data = blobs(4, 40)
    assert how_many.estimate(data, TINY.replaced(most=3), seed=0).edge == "most"
    assert how_many.estimate(data, TINY.replaced(least=5), seed=0).edge == "least"


def test_silhouettes_are_scikit_learns() -> None:
    data = torch.randn(80, 2, generator=torch.Generator().manual_seed(0)).numpy()
    distances = metrics.distances(data)
    for clusters in (torch.arange(80) % 7, torch.arange(80).clamp(max=3) * 5):  # the second with single points
        expected = metrics.silhouette(distances, clusters.numpy())
        assert how_many.silhouette(distances, clusters.numpy()) == pytest.approx(expected, abs=1e-5)
    assert how_many.silhouette(distances, torch.zeros(80).long().numpy()) == 0


@pytest.mark.parametrize("count", [1, 2, 9])
def test_too_few_points_are_one_cluster_with_the_reason(count: int) -> None:
    found = how_many.estimate(blobs(2, count), how_many.Config(), seed=0)
    assert (found.k, found.reason) == (1, "there are fewer than 10 images")


def test_points_of_one_direction_are_one_cluster_with_the_reason() -> None:
    for data in (torch.ones(40, 5), torch.zeros(40, 5), torch.ones(40, 5) * torch.arange(1.0, 41)[:, None]):
        found = how_many.estimate(data, how_many.Config(), seed=0)
        assert (found.k, found.reason) == (1, "the features of nearly all images have one direction")


def test_a_range_wider_than_the_data_ends_below_the_points_of_a_subsample() -> None:
    found = how_many.estimate(blobs(3, 30), TINY.replaced(least=2, most=1000), seed=0)
    assert found.table[-1].k == 23  # 80 % of 30, less one
    assert not found.edge
    found = how_many.estimate(blobs(3, 30), TINY.replaced(least=500, most=1000), seed=0)
    assert (found.k, found.edge) == (23, "least")


@pytest.mark.parametrize("distinct", [3, 4])
def test_there_are_no_more_clusters_than_distinct_points(distinct: int) -> None:
    found = how_many.estimate(blobs(distinct, 60, noise=0.0), TINY, seed=0)
    assert (found.k, found.table[-1].k) == (distinct, distinct)


def test_ten_points_have_an_estimate() -> None:
    found = how_many.estimate(blobs(2, 10), how_many.Config(subsamples=2), seed=0)
    assert found.table
    assert found.edge in ("", "least", "most")


def test_a_plane_of_one_dimensional_and_of_two_points_is_made() -> None:
    assert plane.flatten(torch.linspace(-1, 1, 20)[:, None], perplexity=5.0).shape == (20, 2)
    assert not plane.flatten(blobs(2, 2), perplexity=5.0).any()


def test_a_plane_keeps_neighbours_and_is_the_same_every_time() -> None:
    data = blobs(4, 80)
    one, again = (torch.from_numpy(plane.flatten(data, perplexity=10.0)) for _ in range(2))
    assert torch.equal(one, again)
    nearest = torch.cdist(one, one).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(nearest % 4, torch.arange(80) % 4)
