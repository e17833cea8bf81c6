"""Codes against the plain algorithm in float64, and the properties the paper states."""

import numpy as np
import pytest
import torch

from deepclust.methods.parts import sinkhorn


def plain_sinkhorn(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Algorithm of the paper's appendix A.1, by division, in float64."""
    q = np.exp((scores.astype(np.float64) - scores.max()) / epsilon).T
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * k
        q /= q.sum(axis=0, keepdims=True) * b
    return (q * b).T


@pytest.mark.reference
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.05, 1), (0.5, 10), (0.005, 3)])
def test_codes_equal_the_plain_algorithm_in_float64(seed: int, epsilon: float, iterations: int) -> None:
    scores = np.random.default_rng(seed).uniform(-1, 1, (32, 10)).astype(np.float32)
    expected = plain_sinkhorn(scores, epsilon, iterations)
    found = sinkhorn.codes(torch.from_numpy(scores), epsilon=epsilon, iterations=iterations).numpy()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-6


@pytest.mark.reference
@pytest.mark.parametrize("spread", ["uniform", "mostly at the ends"])
def test_3000_prototypes_at_epsilon_005_keep_float32s_digits(seed: int, spread: str) -> None:
    scores = np.random.default_rng(seed).uniform(-1, 1, (128, 3000)).astype(np.float32)
    if spread != "uniform":
        scores = np.clip(3 * scores, -1, 1)
    expected = plain_sinkhorn(scores, 0.005, 3)
    found = sinkhorn.codes(torch.from_numpy(scores), epsilon=0.005, iterations=3).numpy().astype(np.float64)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-6
    np.testing.assert_allclose(found.sum(1), 1, rtol=0, atol=1e-6)


def test_each_sample_sums_to_one_and_prototypes_are_balanced_in_the_limit() -> None:
    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    codes = sinkhorn.codes(scores, epsilon=0.5, iterations=200)
    torch.testing.assert_close(codes.sum(1), torch.ones(64))
    torch.testing.assert_close(codes.sum(0), torch.full((8,), 8.0), rtol=1e-4, atol=0)


def test_a_small_epsilon_neither_overflows_nor_loses_the_samples_sum() -> None:
    scores = torch.rand(64, 300, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = sinkhorn.codes(scores, epsilon=0.001, iterations=3)
    assert torch.isfinite(codes).all()
    torch.testing.assert_close(codes.sum(1), torch.ones(64))


@pytest.mark.parametrize("epsilon", [0.001, 0.05])
@pytest.mark.parametrize(("batch", "level"), [(8, 0.0), (8, 1.0), (8, -1.0), (1, 1.0)])
def test_samples_that_all_score_the_same_have_even_codes(epsilon: float, batch: int, level: float) -> None:
    codes = sinkhorn.codes(torch.full((batch, 30), level), epsilon=epsilon, iterations=3)
    torch.testing.assert_close(codes, torch.full((batch, 30), 1 / 30))


def test_a_batch_of_one_has_no_other_to_be_balanced_with() -> None:
    scores = torch.linspace(-1, 1, 30)[None]
    torch.testing.assert_close(sinkhorn.codes(scores, epsilon=0.001, iterations=3), torch.full((1, 30), 1 / 30))


def test_a_batch_that_prefers_one_prototype_is_spread_over_all() -> None:
    scores = torch.zeros(40, 4)
    scores[:, 0] = 1.0
    scores += 0.01 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    assert torch.bincount(scores.argmax(1), minlength=4).tolist() == [40, 0, 0, 0]
    assert torch.bincount(sinkhorn.codes(scores, epsilon=0.01, iterations=100).argmax(1), minlength=4).min() >= 5


def test_half_precision_scores_are_computed_in_float32_and_carry_no_gradient() -> None:
    scores = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    codes = sinkhorn.codes(scores, epsilon=0.05, iterations=3)
    assert codes.dtype == torch.float32
    assert not codes.requires_grad
