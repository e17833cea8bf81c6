"""Blurs against scipy, kernels worked out by hand, and their invariants."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from deepclust.corruptions import CORRUPTIONS, blur, corrupt, filters
from tests.deepclust.corruptions.pictures import noisy, seeded


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name.endswith("_blur")])
def test_a_constant_image_stays_constant(name):
    images = torch.full((2, 3, 40, 28), 0.3, dtype=torch.float64)
    torch.testing.assert_close(corrupt(images, name, 5, generator=seeded()), images, rtol=0, atol=1e-12)


def test_gaussian_and_defocus_blur_are_scipys_with_lengths_growing_with_the_shorter_side():
    images = noisy(2, 3, 48, 40)
    scale = 40 / 32
    gaussian, defocus = (corrupt(images, f"{name}_blur", 5, generator=seeded()) for name in ("gaussian", "defocus"))
    radius = math.ceil(4 * scale)
    truth = ndimage.gaussian_filter(images.numpy(), 1.0 * scale, mode="nearest", radius=radius, axes=(2, 3))
    np.testing.assert_allclose(gaussian.numpy(), truth, atol=1e-12)
    kernel = np.array(blur.disc(1.42 * scale))[None, None]
    np.testing.assert_allclose(defocus.numpy(), ndimage.correlate(images.numpy(), kernel, mode="nearest"), atol=1e-12)


def test_the_radii_spread_as_the_benchmarks_kernels_do():
    # Those by hand: a Gaussian of three taps of σ .4, .5 and .6 on a single pixel; a plus of five; a square of nine.
    taps = [2 * math.exp(-1 / (2 * s**2)) / (1 + 2 * math.exp(-1 / (2 * s**2))) for s in (0.4, 0.5, 0.6)]
    for radius, variance in zip(CORRUPTIONS["defocus_blur"].strengths, [*taps, 2 / 5, 2 / 3], strict=True):
        kernel = np.array(blur.disc(radius))
        offsets = np.arange(len(kernel)) - len(kernel) // 2
        assert kernel.sum() == pytest.approx(1)
        np.testing.assert_allclose(kernel, np.rot90(kernel), atol=1e-12)
        assert (kernel.sum(axis=0) * offsets**2).sum() == pytest.approx(variance, rel=0.02)


def test_glass_blur_shows_places_within_reach():
    # A ramp says where each value comes from; σ 0 leaves the places alone.
    ramp = (torch.arange(64, dtype=torch.float64) / 64).expand(64, 64)
    result = blur.glass_blur(ramp[None, None], (0.0, 2.0), seeded())[0, 0]
    moved = ((result - ramp) * 64)[5:-5, 5:-5]
    assert moved.abs().max() <= 2 * 2
    assert moved.std().item() == pytest.approx(4 / math.sqrt(3), rel=0.05)
    # At 64 pixels a facet is of two by two: their differences are the ramp's own.
    facets = (result - ramp).unfold(0, 2, 2).unfold(1, 2, 2)[3:-3, 3:-3].flatten(2)
    assert facets.std(dim=2).max() < 1e-12


def test_a_trail_is_half_a_gaussian_along_its_ray():
    point = torch.zeros(3, 1, 9, 17, dtype=torch.float64)
    point[:, :, 4, 8] = 1
    # The ray goes right from where a value is asked for: a point leaves its trail on the left.
    level, diagonal, between = filters.streaked(point, [0.0, -1.0, 0.5], sigma=2.0, reach=6.0)[:, 0]
    weights = torch.tensor([math.exp(-(step**2) / 8) for step in range(7)], dtype=torch.float64)
    torch.testing.assert_close(level[4, 2:9].flip(0), weights / weights.sum())
    assert level.count_nonzero() == 7
    weights = torch.tensor([math.exp(-2 * step**2 / 8) for step in range(5)], dtype=torch.float64)
    torch.testing.assert_close(diagonal[4:, 4:9].fliplr().diagonal(), weights / weights.sum())
    # A value one step left and half a pixel up, or down the same ray, sees half of the point.
    assert between[3, 7] == pytest.approx(between[4, 7].item())
    assert between[3, 6] > 0
    assert between[5, 7] == 0


def test_motion_blur_does_not_change_what_is_constant_along_its_direction():
    slope = math.tan((torch.rand((), generator=seeded()).item() - 0.5) * math.pi / 2)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for distance, kept in ((y - slope * x, True), (x + slope * y, False)):
        images = (0.5 + 0.005 * distance).double().clamp(0, 1)[None, None]
        change = (corrupt(images, "motion_blur", 3, generator=seeded()) - images)[..., 20:-20, 20:-20]
        assert (change.abs().max() < 1e-6) == kept


def test_zoom_blur_averages_a_ramp_over_its_zooms():
    ramp = (torch.arange(32, dtype=torch.float64) / 32).expand(1, 1, 32, 32)
    # 1.26 moves the edge by 4.2 pixels: six zooms after the first, the least there are.
    share = np.mean([1 / (1 + 0.26 * step / 6) for step in range(7)])
    centre = 15.5 / 32
    for images in (ramp, ramp.mT):
        torch.testing.assert_close(
            corrupt(images, "zoom_blur", 5, generator=seeded()), centre + (images - centre) * share
        )
