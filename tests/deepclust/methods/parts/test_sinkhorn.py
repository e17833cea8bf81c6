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
@pytest.mark.parametrize(
    ("shape", "epsilon", "iterations"),
    [((32, 10), 0.05, 3), ((32, 10), 0.5, 10), ((128, 3000), 0.005, 3)],  # the last is 2.7e-6 off in float32
)
@pytest.mark.parametrize("factor", [1, 3], ids=["uniform", "mostly at the ends"])
def test_codes_equal_the_plain_algorithm_in_float64_to_float32s_digits(
    seed: int, shape: tuple[int, int], epsilon: float, iterations: int, factor: int
) -> None:
    scores = (factor * np.random.default_rng(seed).uniform(-1, 1, shape)).clip(-1, 1).astype(np.float32)
    expected = plain_sinkhorn(scores, epsilon, iterations)
    found = sinkhorn.codes(torch.from_numpy(scores), epsilon=epsilon, iterations=iterations).numpy().astype(np.float64)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-6
    np.testing.assert_allclose(found.sum(1), 1, rtol=0, atol=1e-6)


def test_prototypes_are_balanced_in_the_limit_even_if_all_samples_prefer_one() -> None:
    scores = 0.5 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    scores[:, 0] += 5
    codes = sinkhorn.codes(scores, epsilon=0.5, iterations=200)
    torch.testing.assert_close(codes.sum(0), torch.full((8,), 8.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scores", [torch.zeros(8, 30), -torch.ones(8, 30), torch.linspace(-1, 1, 30)[None]])
def test_samples_that_all_score_the_same_and_a_batch_of_one_have_even_codes(scores: torch.Tensor) -> None:
    for epsilon in (0.001, 0.05):  # at the smaller one plain exponentials overflow
        codes = sinkhorn.codes(scores, epsilon=epsilon, iterations=3)
        torch.testing.assert_close(codes, torch.full(scores.shape, 1 / 30))


def test_half_precision_scores_are_computed_in_float32_and_carry_no_gradient() -> None:
    scores = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    codes = sinkhorn.codes(scores, epsilon=0.05, iterations=3)
    assert codes.dtype == torch.float32
    assert not codes.requires_grad
