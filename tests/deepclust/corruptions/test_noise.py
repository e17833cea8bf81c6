"""Noise against its formulas, and Poisson's distribution against scipy's."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from deepclust.corruptions import corrupt, noise
from tests.deepclust.corruptions.pictures import noisy, seeded


def test_gaussian_noise_has_the_stated_standard_deviation():
    images = torch.full((50, 1, 32, 32), 0.5, dtype=torch.float64)
    for severity, std in enumerate([0.04, 0.06, 0.08, 0.09, 0.10], start=1):
        change = corrupt(images, "gaussian_noise", severity, generator=seeded()) - images
        assert change.std().item() == pytest.approx(std, rel=0.02)
        assert abs(change.mean().item()) < 0.002


def test_shot_noise_is_a_whole_number_of_photons_with_poissons_mean_and_variance():
    images = torch.full((50, 1, 32, 32), 0.4, dtype=torch.float64)
    for severity, photons in enumerate([500, 250, 100, 75, 50], start=1):
        counts = corrupt(images, "shot_noise", severity, generator=seeded()) * photons
        assert torch.allclose(counts, counts.round(), atol=1e-9)
        assert counts.mean().item() == pytest.approx(0.4 * photons, rel=0.01)
        assert counts.var().item() == pytest.approx(0.4 * photons, rel=0.03)


def test_poisson_quantiles_are_scipys():
    random = np.random.default_rng(0)
    rates = np.exp(random.uniform(np.log(1e-3), np.log(500), 40_000))
    normal = random.standard_normal(40_000) * np.where(np.arange(40_000) % 4, 1, 1.5)
    truth = stats.poisson.ppf(special.ndtr(normal), rates)
    np.testing.assert_array_equal(noise.poisson_quantiles(normal, rates), truth)
    np.testing.assert_array_equal(noise.poisson_quantiles(normal[:9], np.zeros(9)), np.zeros(9))


def test_impulse_noise_makes_the_stated_share_of_values_black_or_white():
    images = 0.1 + 0.8 * noisy(40, 3, 32, 32)
    before = torch.zeros_like(images, dtype=torch.bool)
    for severity, share in enumerate([0.01, 0.02, 0.03, 0.05, 0.07], start=1):
        result = corrupt(images, "impulse_noise", severity, generator=seeded())
        changed = result != images
        assert ((result == 0) | (result == 1))[changed].all()
        assert changed.double().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share / images.numel()))
        assert (result == 1).sum().item() == pytest.approx(changed.sum().item() / 2, rel=0.1)
        assert changed[before].all(), "what a weaker severity hits, a stronger one hits too"
        before = changed
        assert not torch.equal(changed[:, 0], changed[:, 1]), "each channel has noise of its own"
