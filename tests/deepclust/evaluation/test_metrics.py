"""Metrics by hand and by exhaustive search."""

from itertools import permutations

import numpy as np
import pytest

from deepclust.evaluation import metrics


def test_matched_accuracy_is_the_best_of_all_matchings():
    rng = np.random.default_rng(0)
    for _ in range(5):
        labels, clusters = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
        best = max(np.mean(np.array(order)[clusters] == labels) for order in permutations(range(4)))
        assert metrics.matched_accuracy(labels, clusters) == pytest.approx(best)


def test_surplus_clusters_count_as_wrong_and_too_few_match_one_class_each():
    labels = np.array([0, 0, 1, 1, 2, 2])
    for clusters, expected in (([2, 2, 0, 0, 1, 1], 1), ([0, 3, 1, 4, 2, 5], 1 / 2), ([0, 0, 0, 0, 5, 5], 2 / 3)):
        assert metrics.matched_accuracy(labels, np.array(clusters)) == pytest.approx(expected)
    assert metrics.nmi(labels, np.array([2, 2, 0, 0, 1, 1])) == pytest.approx(1.0)
    assert metrics.ari(labels, np.array([2, 2, 0, 0, 1, 1])) == pytest.approx(1.0)


def test_silhouette_by_hand_and_undefined_for_one_cluster():
    distance = metrics.distances(np.array([[0.0], [1.0], [10.0], [11.0]], dtype=np.float32))
    expected = 1 - (1 / 10.5 + 1 / 9.5) / 2
    assert metrics.silhouette(distance, np.array([0, 0, 1, 1])) == pytest.approx(expected)
    assert metrics.silhouette(distance, np.zeros(4, dtype=np.int64)) is None


def test_rankme_of_rows_read_part_by_part_is_the_formula_in_float64(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "rows.npy", (rng.normal(size=(203, 9)) * rng.gamma(1, size=9)).astype(np.float32))
    monkeypatch.setattr(metrics, "_CHUNK", 9 * 20)  # the last part is shorter
    rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for some in (rows, rows[:9], rows[:5]):  # with fewer rows than columns too
        singular = np.linalg.svd(np.asarray(some, dtype=np.float64), compute_uv=False)
        p = singular / singular.sum() + 1e-7
        assert metrics.rankme(some) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert metrics.rankme(np.zeros((40, 8), dtype=np.float32)) == 1.0
