"""Blurs against scipy, kernels worked out by hand, and their invariants."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from deepclust.corruptions import CORRUPTIONS, blur, corrupt, filters
from tests.deepclust.corruptions.pictures import noisy, seeded

BLURS = [name for name in CORRUPTIONS if name.endswith("_blur")]


@pytest.mark.parametrize("name", BLURS)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 40, 28)])
def test_a_constant_image_stays_constant(name, shape):
    images = torch.full(shape, 0.3, dtype=torch.float64)
    for severity in (1, 5):
        torch.testing.assert_close(corrupt(images, name, severity, generator=seeded()), images, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (40, 24)])
def test_gaussian_blur_is_scipys_with_sigma_growing_with_the_shorter_side(height, width):
    images = noisy(2, 3, height, width)
    sigma = 1.0 * min(height, width) / 32
    result = corrupt(images, "gaussian_blur", 5, generator=seeded()).numpy()
    radius = math.ceil(4 * sigma)
    truth = ndimage.gaussian_filter(images.numpy(), sigma, mode="nearest", radius=radius, axes=(2, 3))
    np.testing.assert_allclose(result, truth, atol=1e-12)


@pytest.mark.parametrize("radius", [0.3, 0.9, 1.42, 2.0, 6.5])
def test_the_disc_is_a_normalised_average_over_a_disc(radius):
    kernel = np.array(blur.disc(radius))
    reach = len(kernel) // 2
    offsets = np.arange(-reach, reach + 1)
    distance = np.hypot(offsets[:, None], offsets)
    assert kernel.sum() == pytest.approx(1)
    assert (kernel[distance >= radius + math.sqrt(2)] == 0).all()
    np.testing.assert_allclose(kernel, np.rot90(kernel), atol=1e-12)
    inner = kernel[distance <= radius - math.sqrt(2)]
    np.testing.assert_allclose(inner, 1 / (math.pi * radius**2), rtol=0.01)
    # A bilinear value at t between two pixels spreads as t·(1 - t) about t; the disc itself as r²/4 along an axis.
    points = np.random.default_rng(0).uniform(-radius, radius, (200_000, 2))
    along = points[np.hypot(*points.T) < radius, 0]
    share = along - np.floor(along)
    assert (kernel.sum(axis=0) * offsets**2).sum() == pytest.approx((along**2 + share * (1 - share)).mean(), rel=0.02)


def test_the_radii_spread_as_the_benchmarks_kernels_do():
    # Those by hand: a Gaussian of three taps of σ .4, .5 and .6 on a single pixel; a plus of five; a square of nine.
    taps = [2 * math.exp(-1 / (2 * s**2)) / (1 + 2 * math.exp(-1 / (2 * s**2))) for s in (0.4, 0.5, 0.6)]
    for radius, variance in zip(CORRUPTIONS["defocus_blur"].strengths, [*taps, 2 / 5, 2 / 3], strict=True):
        kernel = np.array(blur.disc(radius))
        offsets = np.arange(len(kernel)) - len(kernel) // 2
        assert (kernel.sum(axis=0) * offsets**2).sum() == pytest.approx(variance, rel=0.02)


def test_defocus_blur_is_scipys_correlation_with_the_disc():
    images = noisy(2, 3, 48, 40)
    result = corrupt(images, "defocus_blur", 5, generator=seeded()).numpy()
    kernel = np.array(blur.disc(1.42 * 40 / 32))[None, None]
    np.testing.assert_allclose(result, ndimage.correlate(images.numpy(), kernel, mode="nearest"), atol=1e-12)


def test_glass_blur_shows_places_within_reach():
    # A ramp says where each value comes from; σ 0 leaves the places alone.
    x = torch.arange(64, dtype=torch.float64) / 64
    for ramp, generator in ((x.expand(64, 64), seeded()), (x.expand(64, 64).T, seeded())):
        result = blur.glass_blur(ramp[None, None], (0.0, 2.0), generator)[0, 0]
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
    generator = seeded()
    slope = math.tan((torch.rand((), generator=seeded()).item() - 0.5) * math.pi / 2)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    along = (0.5 + 0.005 * (y - slope * x)).double().clamp(0, 1)
    across = (0.5 + 0.005 * (x + slope * y)).double().clamp(0, 1)
    inner = (slice(None), slice(None), slice(20, -20), slice(20, -20))
    for picture, kept in ((along, True), (across, False)):
        images = picture[None, None]
        result = corrupt(images, "motion_blur", 3, generator=generator)
        generator = seeded()
        assert ((result - images)[inner].abs().max() < 1e-6) == kept


@pytest.mark.parametrize("shape", [(21, 21), (33, 25)])
def test_zoom_blur_keeps_the_centre_and_the_symmetry_of_a_radial_image(shape):
    y, x = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2 for size in shape)
    images = torch.exp(-(y[:, None] ** 2 + x**2) / 60)[None, None]
    result = corrupt(images, "zoom_blur", 5, generator=seeded())
    centre = (0, 0, shape[0] // 2, shape[1] // 2)
    assert result[centre] == pytest.approx(images[centre].item(), abs=1e-12)
    torch.testing.assert_close(result, result.flip(2))
    torch.testing.assert_close(result, result.flip(3))
    assert (result >= images - 1e-3).all(), "a zoom brings brighter values outwards"


def test_zoom_blur_averages_a_ramp_over_its_zooms():
    ramp = (torch.arange(32, dtype=torch.float64) / 32).expand(1, 1, 32, 32)
    result = corrupt(ramp, "zoom_blur", 5, generator=seeded())
    # 1.26 moves the edge by 4.2 pixels: six zooms after the first, the least there are.
    share = np.mean([1 / (1 + 0.26 * step / 6) for step in range(7)])
    centre = 15.5 / 32
    torch.testing.assert_close(result, centre + (ramp - centre) * share)
