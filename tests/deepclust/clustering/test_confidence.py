"""How sure a clustering is, against the formulas in float64 and by hand, and what rejection brings."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy.special import softmax

from deepclust.clustering import confidence, kmeans, neighbours
from deepclust.clustering.assigners import Assigner, Centroids, Layers
from deepclust.evaluation import metrics

K, DIM = 4, 5


def points(count: int = 300, seed: int = 0) -> torch.Tensor:
    """Groups that overlap."""
    random = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(K, DIM, generator=random)
    return centres[torch.arange(count) % K] + torch.randn(count, DIM, generator=random)


def centroids(data: torch.Tensor, seed: int) -> Centroids:
    return Centroids.of(kmeans.fit(data, K, seed=seed, iterations=2, initialisation="points").centroids, data)


def head(seed: int) -> Layers:
    random = torch.Generator().manual_seed(seed)
    return Layers([(torch.randn(K, DIM, generator=random), torch.randn(K, generator=random))])


def in_float64(assigner: Assigner, data: np.ndarray) -> np.ndarray:
    """Probabilities by the formulas of deepclust/clustering/assigners.py."""
    if isinstance(assigner, Centroids):
        squared = np.square(data[:, None] - assigner.centroids.double().numpy()).sum(2)
        return softmax(-squared / assigner.scale, axis=1)
    assert isinstance(assigner, Layers)
    ((weight, bias),) = assigner.layers
    return softmax(data @ weight.double().numpy().T + bias.double().numpy(), axis=1)


@pytest.mark.parametrize("make", [centroids, lambda _, seed: head(seed)], ids=["centroids", "layers"])
def test_every_number_is_the_formulas_in_float64(make) -> None:  # type: ignore[no-untyped-def]
    data, new = points(), 1.5 * points(100, seed=1)
    first, *others = (make(data, seed) for seed in range(4))
    found = confidence.fit(first, data, refits=others, normalise=False, algorithm="any")[0]
    judged = found.judge(new)

    chances = [in_float64(assigner, new.double().numpy()) for assigner in (first, *others)]
    clusters = chances[0].argmax(1)
    assert judged.clusters.tolist() == clusters.tolist()
    ordered = np.sort(chances[0], axis=1)
    np.testing.assert_allclose(judged.margins, ordered[:, -1] - ordered[:, -2], atol=1e-5)
    train = in_float64(first, data.double().numpy()).argmax(1)
    means = first.centroids.numpy() if isinstance(first, Centroids) else None
    if means is None:
        means = np.stack([data.double().numpy()[train == cluster].mean(0) for cluster in range(K)])
    distances = np.linalg.norm(new.numpy() - means[clusters], axis=1)
    np.testing.assert_allclose(judged.distances, distances, rtol=1e-5)
    same, given = [], [chances[0][np.arange(100), clusters]]
    for assigner, chance in zip(others, chances[1:], strict=True):
        other = in_float64(assigner, data.double().numpy()).argmax(1)
        best = max(itertools.permutations(range(K)), key=lambda order: (np.array(order)[train] == other).sum())
        wanted = np.array(best)[clusters]
        same.append(chance.argmax(1) == wanted)
        given.append(chance[np.arange(100), wanted])
    np.testing.assert_allclose(judged.agreements, np.mean(same, axis=0), atol=1e-6)
    assert len(judged.agreements.unique()) > 2, "the refits differ"
    reach = np.sort(np.linalg.norm(data.numpy() - means[train], axis=1))[int(0.99 * 299)]
    assert found.reach == pytest.approx(reach, rel=1e-5)
    assert (distances > reach).any()
    unit, units = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (new.double().numpy(), data.double().numpy()))
    nearest = np.argsort(-unit @ units.T, axis=1)[:, :16]
    share = (train[nearest] == clusters[:, None]).mean(1)
    np.testing.assert_allclose(judged.neighbours, share, atol=1e-6)
    expected = (np.mean(given, 0) + share) / 2 * np.minimum(1, reach / distances)
    np.testing.assert_allclose(judged.scores, expected, atol=1e-5)


def test_the_numbers_of_clusters_in_a_refit_do_not_matter_and_an_equal_refit_agrees_everywhere() -> None:
    data = points()
    first = centroids(data, 0)
    alone, again = (
        confidence.fit(first, data, refits=refits, normalise=False, algorithm="kmeans")[0].judge(data)
        for refits in ([], [Centroids(first.centroids[[2, 0, 3, 1]], first.scale)])
    )
    assert (again.agreements == 1).all()
    assert alone.agreements.isnan().all()
    torch.testing.assert_close(alone.scores, again.scores, rtol=0, atol=1e-6)


def test_a_point_and_its_copies_have_no_say_in_the_bank() -> None:
    data = points(40)
    found = confidence.fit(centroids(data, 0), data, normalise=False, algorithm="kmeans")[0]
    assert found.bank
    unit = torch.nn.functional.normalize(data.double())
    nearest = (unit @ unit.T).fill_diagonal_(-1).topk(15).indices
    clusters = found.judge(data).clusters
    share = (clusters[nearest] == clusters[:, None]).float().mean(1)
    torch.testing.assert_close(found.judge(data).neighbours, share)


def test_refits_of_another_number_of_clusters_have_no_say() -> None:
    data = points()
    other = Centroids.of(data[:3], data)
    found = confidence.fit(
        centroids(data, 0), data, refits=[other, centroids(data, 1)], normalise=False, algorithm="k"
    )[0]
    assert [refit.assigner.k for refit in found.refits] == [K]


def test_a_point_far_from_all_is_less_sure_the_farther_though_the_head_is_the_surer() -> None:
    found = dataclasses.replace(confidence.fit(head(0), points(), normalise=False, algorithm="any")[0], bank=None)
    judged = found.judge(torch.ones(1, DIM) * torch.tensor([[10.0], [100.0], [1000.0]]))
    assert (judged.margins > 0.99).all()
    assert judged.scores[0] > 5 * judged.scores[1] > 25 * judged.scores[2] > 0


def test_the_threshold_leaves_the_share_of_train_below_it_and_never_splits_equals() -> None:
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for share in (0.05, 0.1, 0.29, 0.5):
        limit = confidence.threshold(scores, share)
        assert int((scores < limit).sum()) == round(1000 * share)
    assert confidence.threshold(scores, 0) is None
    equal = torch.tensor([0.2, 0.5, 0.5, 0.5, 0.9])
    assert confidence.threshold(equal, 0.4) == 0.5
    assert confidence.threshold(torch.ones(9), 0.9) == 1, "of which none is below"
    assert confidence.threshold(torch.tensor([0.3]), 0.99) == pytest.approx(0.3)


def test_what_is_fitted_rejects_its_share_of_train_and_the_same_twice() -> None:
    data = points()
    one, two = (
        confidence.fit(
            centroids(data, 0), data, refits=[centroids(data, 1)], normalise=False, algorithm="k", reject=0.1
        )[0]
        for _ in range(2)
    )
    assert one.reject == two.reject
    judged = one.judge(data)
    kept = one.kept(judged)
    assert (kept == -1).sum() == 30
    assert torch.equal(kept[kept >= 0], judged.clusters[kept >= 0])
    assert judged.scores[kept < 0].max() < judged.scores[kept >= 0].min()
    for before, after in zip(judged, two.judge(data), strict=True):
        assert torch.equal(before, after)


def test_neighbours_agreement_is_the_share_in_the_same_cluster() -> None:
    data, new = points(), points(20, seed=1)
    bank, own = centroids(data, 0).assign(data), centroids(data, 0).assign(new)
    nearest = neighbours.search(new, data, 7).indices
    cosines = torch.nn.functional.normalize(new.double()) @ torch.nn.functional.normalize(data.double()).T
    expected = [float((bank[cosines[row].topk(7).indices] == own[row]).double().mean()) for row in range(20)]
    assert len(set(expected)) > 2
    assert confidence.neighbours_agreement(own, nearest, bank).tolist() == pytest.approx(expected)


def test_accuracy_against_coverage_is_by_hand_and_its_gain_is_of_what_perfect_rejection_brings() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    clusters = np.array([3, 3, 3, 1, 1, 1, 1, 3, 0, 1])
    right = confidence.right(labels, clusters)
    assert right.tolist() == [True, True, True, False, True, True, True, False, True, False]
    assert right.mean() == metrics.matched_accuracy(labels, clusters) == 0.7
    scores = np.where(right, 0.9, 0.2).astype(np.float32)
    rows = confidence.table(labels, clusters, scores)
    assert [row.coverage for row in rows] == [1.0, 1.0, 0.9, 0.8, 0.7, 0.5], "as ten images allow"
    assert rows[0] == confidence.Covered(1.0, 0.7, 0.7, None)
    for row in rows[2:]:
        assert row.gained == pytest.approx(1)
        assert row.accuracy == pytest.approx(row.perfect) == pytest.approx(min(1, 0.7 / row.coverage))
    kept = np.ones(10, bool)
    kept[[0, 3]] = False  # a right and a wrong one: 6 of 8 against a possible 7 of 8
    assert confidence.covered(right, kept).gained == pytest.approx((6 / 8 - 0.7) / (7 / 8 - 0.7))
    assert confidence.covered(np.ones(3, bool), np.array([True, False, True])).gained is None


@pytest.mark.parametrize("count", [1, 2, 40])
def test_equal_points_fewer_points_than_clusters_and_a_cluster_without_points_have_finite_scores(count: int) -> None:
    data = torch.ones(count, DIM)
    for assigner in (Centroids.of(data[:1].repeat(K, 1), data), head(0)):
        found = confidence.fit(assigner, data, refits=[assigner], normalise=False, algorithm="any", reject=0.5)[0]
        assert found.centroids.isfinite().all()
        judged = found.judge(torch.cat([data, 1 + data]))
        assert all(part.isfinite().all() for part in judged)
        assert (found.kept(judged)[:count] >= 0).all(), "equal scores: none is below the threshold"


def test_of_no_points_there_are_no_clusters() -> None:
    found = confidence.fit(head(0), points(), refits=[head(1)], normalise=False, algorithm="any")[0]
    assert [len(part) for part in found.judge(torch.empty(0, DIM))] == [0] * 6


@pytest.mark.parametrize("reject", [0.0, 0.3])
def test_what_a_fit_says_of_its_points_is_what_the_clusters_then_say(reject: float) -> None:
    data = points()
    found, judged = confidence.fit(head(0), data, refits=[head(1)], normalise=False, algorithm="any", reject=reject)
    assert all(torch.equal(one, again) for one, again in zip(judged, found.judge(data), strict=True))
    assert (judged.distances > found.reach).any(), "some scores fall by the distance"
