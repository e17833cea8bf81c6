"""One picture of each fault is first in its list; scores by NumPy and SciPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from deepclust.clustering import neighbours
from deepclust.inspection import grey, unusual
from tests.deepclust.inspection.pictures import textures


def similarities(count: int, seed: int = 0) -> torch.Tensor:
    points = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return neighbours.graph(points + 2, 5).similarities


def test_the_image_of_each_fault_is_listed_first() -> None:
    pictures = textures(60, 48)
    pictures[3] = 140
    pictures[4] = pictures[4] // 8
    pictures[5] = 255 - (255 - pictures[5]) // 8
    pictures[6] = ndimage.gaussian_filter(pictures[6], (3, 3, 0))
    points = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) + 4
    points[7] = -points[7]
    found = unusual.find(pictures, neighbours.graph(points, 5).similarities)
    first = {"outlier": 7, "blank": 3, "dark": 4, "bright": 5, "blurred": 6}
    assert {kind: scores.listed[0] for kind, scores in found.items()} == first
    assert found["blank"].listed.tolist() == [3]
    assert found["dark"].listed.tolist() == [4]
    assert found["bright"].listed.tolist() == [5]


def test_scores_are_those_of_numpy_and_scipy_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grey, "_VALUES_AT_ONCE", 4 * 30 * 30 * 3)
    pictures, cosines = textures(10, 30), similarities(10)
    found = unusual.find(pictures, cosines)
    levels = pictures.astype(np.float64) @ [0.299, 0.587, 0.114]
    expected = {
        "outlier": np.sqrt(2 - 2 * cosines.double().numpy()).mean(1),
        "blank": -levels.std((1, 2)),
        "dark": -np.percentile(levels, 99, axis=(1, 2)),
        "bright": np.percentile(levels, 5, axis=(1, 2)),
        "blurred": [-np.log(ndimage.laplace(one)[1:-1, 1:-1].var() / one.var()) for one in levels],
    }
    assert found.keys() == expected.keys()
    for kind, scores in found.items():
        np.testing.assert_allclose(scores.values, expected[kind], rtol=1e-4, atol=1e-5)


def test_percentiles_of_large_images_are_close_to_those_of_all_pixels() -> None:
    pictures = textures(5, 200, channels=1)
    found = unusual.find(pictures, similarities(5))
    np.testing.assert_allclose(-found["dark"].values, np.percentile(pictures, 99, axis=(1, 2, 3)), atol=4)
    np.testing.assert_allclose(found["bright"].values, np.percentile(pictures, 5, axis=(1, 2, 3)), atol=4)


def test_the_threshold_is_a_modified_z_score_of_three_and_a_half() -> None:
    values = np.random.default_rng(0).normal(5, 2, 1001).astype(np.float32)
    threshold = unusual.robust_threshold(values)
    median = np.median(values)
    mad = np.median(np.abs(values - median))
    assert 0.6745 * (threshold - median) / mad == pytest.approx(3.5, rel=1e-6)
    spoilt = values.copy()
    spoilt[:400] = 1e6  # fewer than half do not carry it away
    assert unusual.robust_threshold(spoilt) < 100


def test_lists_are_sorted_by_score_and_then_by_index() -> None:
    scores = unusual.Scores(np.array([1, 5, 3, 5, 0, 4], np.float32), 1.0)
    assert scores.listed.tolist() == [1, 3, 5, 2]


def test_a_blank_image_is_not_called_blurred() -> None:
    pictures = textures(30, 32)
    pictures[2:5] = 200
    found = unusual.find(pictures, similarities(30))
    assert found["blank"].listed.tolist() == [2, 3, 4]
    assert not set(found["blurred"].listed) & {2, 3, 4}


@pytest.mark.parametrize("count", [0, 1, 12])
def test_images_that_are_all_the_same_are_not_unusual_among_themselves(count: int) -> None:
    pictures = np.repeat(textures(1, 20), count, axis=0)
    cosines = torch.ones(count, max(0, min(5, count - 1)))
    found = unusual.find(pictures, cosines)
    for scores in found.values():
        assert scores.values.shape == (count,)
        assert np.isfinite(scores.values).all()
        assert not len(scores.listed)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_tiny_blank_images_have_finite_scores(side: int) -> None:
    found = unusual.find(np.full((4, side, side, 1), 128, np.uint8), torch.ones(4, 3))
    assert all(np.isfinite(scores.values).all() for scores in found.values())
    assert len(found["blank"].listed) == 4


def test_images_are_left_as_they_were() -> None:
    pictures = textures(6, 20)
    before = pictures.copy()
    unusual.find(pictures, similarities(6))
    np.testing.assert_array_equal(pictures, before)
