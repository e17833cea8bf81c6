"""Each corruption against its formula, a case by hand, or another library: scipy, Pillow, colorsys."""

import colorsys
import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, special, stats

from deepclust.corruptions import CORRUPTIONS, blur, corrupt, digital, filters, noise
from tests.deepclust.corruptions.pictures import noisy, scenes, seeded


def test_noise_has_the_stated_deviation_or_number_of_photons():
    images = torch.full((50, 1, 32, 32), 0.4, dtype=torch.float64)
    stated = zip([0.04, 0.06, 0.08, 0.09, 0.10], [500, 250, 100, 75, 50], strict=True)
    for severity, (std, photons) in enumerate(stated, start=1):
        change = corrupt(images, "gaussian_noise", severity, generator=seeded()) - images
        assert change.std().item() == pytest.approx(std, rel=0.02)
        assert abs(change.mean().item()) < 0.002
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


def test_impulse_noise_makes_the_stated_share_of_values_black_or_white():
    images = 0.1 + 0.8 * noisy(40, 3, 32, 32)
    for severity, share in enumerate([0.01, 0.02, 0.03, 0.05, 0.07], start=1):
        result = corrupt(images, "impulse_noise", severity, generator=seeded())
        changed = result != images
        assert ((result == 0) | (result == 1))[changed].all()
        assert changed.double().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share / images.numel()))
        assert (result == 1).sum().item() == pytest.approx(changed.sum().item() / 2, rel=0.1)
        assert not torch.equal(changed[:, 0], changed[:, 1]), "each channel has noise of its own"


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
        assert (kernel.sum(axis=0) * offsets**2).sum() == pytest.approx(variance, rel=0.02)


def test_glass_blur_shows_places_within_reach():
    # A ramp says where each value comes from; σ 0 leaves the places alone.
    ramp = (torch.arange(64, dtype=torch.float64) / 64).expand(64, 64)
    result = blur.glass_blur(ramp[None, None], (0.0, 2.0), seeded())[0, 0]
    moved = ((result - ramp) * 64)[5:-5, 5:-5]
    assert moved.abs().max() <= 2 * 2
    assert moved.std().item() == pytest.approx(4 / math.sqrt(3), rel=0.05)


def test_a_trail_is_half_a_gaussian_along_its_ray():
    point = torch.zeros(2, 1, 9, 17, dtype=torch.float64)
    point[:, :, 4, 8] = 1
    # The ray goes right from where a value is asked for: a point leaves its trail on the left.
    level, diagonal = filters.streaked(point, [0.0, -1.0], sigma=2.0, reach=6.0)[:, 0]
    for found, slope, steps in ((level[4, 2:9].flip(0), 0, 7), (diagonal[4:, 4:9].fliplr().diagonal(), 1, 5)):
        weights = torch.tensor([math.exp(-(1 + slope) * step**2 / 8) for step in range(steps)], dtype=torch.float64)
        torch.testing.assert_close(found, weights / weights.sum())


def test_zoom_blur_averages_a_ramp_over_its_zooms():
    ramp = (torch.arange(32, dtype=torch.float64) / 32).expand(1, 1, 32, 32)
    # 1.26 moves the edge by 4.2 pixels: six zooms after the first, the least there are.
    share = np.mean([1 / (1 + 0.26 * step / 6) for step in range(7)])
    centre = 15.5 / 32
    result = corrupt(ramp, "zoom_blur", 5, generator=seeded())
    torch.testing.assert_close(result, centre + (ramp - centre) * share)


def plain_plasma(chances, decay):
    """Diamonds and squares point by point on a torus; each point's own number displaces it."""
    side = len(chances)
    cloud = np.zeros((side, side))
    step, amplitude = side, 1.0
    while step > 1:
        half = step // 2
        for y, x in itertools.product(range(half, side, step), range(half, side, step)):
            around = [cloud[(y + dy) % side, (x + dx) % side] for dy in (-half, half) for dx in (-half, half)]
            cloud[y, x] = np.mean(around) + amplitude * (2 * chances[y, x] - 1)
        for y, x in itertools.product(range(0, side, half), range(0, side, half)):
            if (y // half + x // half) % 2:
                around = [cloud[(y + d) % side, x] for d in (-half, half)]
                around += [cloud[y, (x + d) % side] for d in (-half, half)]
                cloud[y, x] = np.mean(around) + amplitude * (2 * chances[y, x] - 1)
        step, amplitude = half, amplitude / decay**2
    return cloud


def test_fog_is_a_plasma_fractal_under_the_scenes_own_white():
    images, amount, decay = noisy(2, 3, 20, 28) * 0.8, 1.5, 1.75
    result = corrupt(images, "fog", 5, generator=seeded()).numpy()
    generator = seeded()
    for image, foggy in zip(images.numpy(), result, strict=True):
        cloud = plain_plasma(torch.rand(32, 32, generator=generator).double().numpy(), decay)[:20, :28]
        cloud = (cloud - cloud.min()) / (cloud.max() - cloud.min())
        np.testing.assert_allclose(foggy, (image + amount * cloud) * image.max() / (image.max() + amount), atol=1e-12)


def test_frost_is_a_mixture_of_the_scene_and_bluish_ice():
    images = scenes(4, 3, 32, 32)
    ice = corrupt(torch.zeros_like(images), "frost", 5, generator=seeded())
    result = corrupt(images, "frost", 5, generator=seeded())
    torch.testing.assert_close(result, (0.75 * images + ice).clamp(max=1))
    assert ice.max() <= 0.6 * 1.06
    assert (ice.mean(dim=(0, 2, 3)).diff() > 0).all()


def test_snow_whitens_by_luminance_and_adds_flakes_and_their_half_turn_that_fall_rather_down():
    flakes = corrupt(torch.zeros(40, 3, 48, 48, dtype=torch.float64), "snow", 1, generator=seeded()) - 0.05 * 0.5
    torch.testing.assert_close(flakes, flakes.flip(2, 3))
    assert flakes.diff(dim=2).square().mean() < 0.6 * flakes.diff(dim=3).square().mean()
    colour = torch.tensor([0.8, 0.2, 0.4], dtype=torch.float64).view(3, 1, 1).expand_as(flakes)
    whiter = torch.maximum(colour, torch.tensor(1.5 * (0.299 * 0.8 + 0.587 * 0.2 + 0.114 * 0.4) + 0.5))
    snowy = corrupt(colour, "snow", 1, generator=seeded())
    torch.testing.assert_close(snowy, (0.95 * colour + 0.05 * whiter + flakes).clamp(max=1))


def test_contrast_keeps_a_share_of_the_distance_to_each_channels_mean():
    images = noisy(3, 3, 13, 21)  # sizes that are no power of two
    mean = images.mean(dim=(2, 3), keepdim=True)
    result = corrupt(images, "contrast", 5, generator=seeded())
    torch.testing.assert_close(result, mean + 0.15 * (images - mean))


def test_brightness_adds_to_the_value_of_hsv_and_for_grey_images_to_the_value():
    pixels = [(0.2, 0.4, 0.1), (0.0, 0.0, 0.0), (0.9, 0.5, 0.95), (1.0, 1.0, 1.0)]
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels]
    truth = [colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1)) for hue, saturation, value in hsv]
    images = torch.tensor(pixels, dtype=torch.float64).T.reshape(1, 3, 1, -1)
    result = corrupt(images, "brightness", 5, generator=seeded()).reshape(3, -1).T
    torch.testing.assert_close(result, torch.tensor(truth, dtype=torch.float64))
    grey = images[:, :1]
    torch.testing.assert_close(corrupt(grey, "brightness", 1, generator=seeded()), (grey + 0.05).clamp(max=1))


def test_the_affine_part_moves_three_points_as_drawn():
    height, width, move = 40, 48, 3.0
    images = scenes(1, 1, height, width)
    result = digital.elastic_transform(images, (0.0, 1.0, move), seeded())[0, 0].numpy()
    generator = seeded()
    torch.randn((2, height, width), generator=generator)
    drawn = (2 * torch.rand((2, 3), generator=generator).double().numpy() - 1) * move * height / 32
    centre, third = np.array([(height - 1) / 2, (width - 1) / 2]), height / 3
    points = centre + third * np.array([(1, 1), (-1, 1), (-1, -1)])
    matrix = np.linalg.solve(np.c_[points, np.ones(3)], points + drawn.T)
    grid = np.stack([*np.indices((height, width)), np.ones((height, width))], axis=-1) @ matrix
    truth = ndimage.map_coordinates(images[0, 0].numpy(), np.moveaxis(grid, -1, 0), order=1, mode="reflect")
    np.testing.assert_allclose(result, truth, atol=1e-9)


def test_pixelate_is_pillows_box_down_and_up_again():
    images = noisy(1, 1, 64, 80).float()
    block = 1 + (1 / 0.85 - 1) * 2
    small = Image.fromarray(images[0, 0].numpy()).resize((int(80 / block), int(64 / block)), Image.Resampling.BOX)
    result = corrupt(images, "pixelate", 3, generator=seeded())[0, 0].numpy()
    np.testing.assert_allclose(result, np.asarray(small.resize((80, 64), Image.Resampling.BOX)), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 40)])
def test_jpeg_is_pillows_at_the_stated_quality(shape):
    images = scenes(1, *shape).float()
    pixels = (images[0] * 255).round().byte().permute(1, 2, 0).squeeze(2).numpy()
    for severity, quality in enumerate([80, 65, 58, 50, 40], start=1):
        compressed = corrupt(images, "jpeg_compression", severity, generator=seeded())[0]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        truth = np.atleast_3d(np.asarray(Image.open(file))) / 255
        np.testing.assert_allclose(compressed.permute(1, 2, 0).numpy(), truth, atol=1e-6)


def test_rotation_is_scipys_rotation_to_one_side_or_the_other():
    images = noisy(6, 1, 16, 24)
    result = corrupt(images, "rotation", 2, generator=seeded()).numpy()
    # scipy's `reflect` mirrors at the pixels' edges, as grid_sample's `reflection` without aligned corners does.
    turn = {"axes": (3, 2), "reshape": False, "order": 1, "mode": "reflect"}
    distances = [np.abs(result - ndimage.rotate(images, angle, **turn)).max((1, 2, 3)) for angle in (-16, 16)]
    assert (np.min(distances, axis=0) < 1e-9).all()
    assert set(np.argmin(distances, axis=0)) == {0, 1}
