"""Weather: fog against a plain fractal, frost and snow against what defines them."""

import itertools

import numpy as np
import pytest
import torch

from deepclust.corruptions import corrupt, weather
from tests.deepclust.corruptions.pictures import noisy, scenes, seeded


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


@pytest.mark.parametrize(("severity", "kept", "amount"), [(1, 1.0, 0.2), (5, 0.75, 0.6)])
def test_frost_is_a_mixture_of_the_scene_and_bluish_ice(severity, kept, amount):
    images = scenes(4, 3, 32, 32)
    ice = corrupt(torch.zeros_like(images), "frost", severity, generator=seeded())
    result = corrupt(images, "frost", severity, generator=seeded())
    torch.testing.assert_close(result, (kept * images + ice).clamp(max=1))
    assert ice.max() <= amount * 1.06
    red, green, blue = ice.mean(dim=(0, 2, 3)).tolist()
    assert red < green < blue


@pytest.mark.parametrize("side", [28, 100])
def test_ice_has_crystals_on_a_dimmer_film_at_every_size(side):
    ice = weather.frost_texture(torch.zeros(6, 1, side, side), seeded())
    assert ice.min() >= 0.1 - 1e-6
    assert ice.max() <= 1
    assert 0.25 < ice.mean() < 0.6
    assert ((ice.amax(dim=(2, 3)) - ice.mean(dim=(2, 3))) > 0.25).all(), "an image without a crystal"


def test_a_needle_points_six_ways():
    points = torch.zeros(1, 1, 65, 65, dtype=torch.float64)
    points[0, 0, 32, 32] = 1
    star = weather._needles(points, [0.1], length=4.0)[0, 0]
    y, x = torch.meshgrid(torch.arange(65) - 32.0, torch.arange(65) - 32.0, indexing="ij")
    ring = (torch.hypot(y, x) - 8).abs() < 0.5
    angles = torch.atan2(y[ring], x[ring]).rad2deg()
    brightness = star[ring]
    for spoke in range(6):
        at = 0.1 * 180 / np.pi + 60 * spoke
        # A ray is followed to the light, and flipping twice makes the six complete; between them it is dark.
        turn = (angles - at + 180) % 360 - 180
        between = (angles - at - 30 + 180) % 360 - 180
        assert brightness[turn.abs() < 5].max() > 0.1
        assert brightness[between.abs() < 8].max() < 0.02


def test_snow_whitens_by_luminance_and_adds_flakes_and_their_half_turn_that_fall_rather_down():
    flakes = corrupt(torch.zeros(40, 3, 48, 48, dtype=torch.float64), "snow", 1, generator=seeded()) - 0.05 * 0.5
    assert flakes.min() >= -1e-12
    assert (flakes.amax(dim=(1, 2, 3)) > 0.05).all()
    torch.testing.assert_close(flakes, flakes.flip(2, 3))
    assert flakes.diff(dim=2).square().mean() < 0.6 * flakes.diff(dim=3).square().mean()
    colour = torch.tensor([0.8, 0.2, 0.4], dtype=torch.float64).view(3, 1, 1).expand_as(flakes)
    whiter = torch.maximum(colour, torch.tensor(1.5 * (0.299 * 0.8 + 0.587 * 0.2 + 0.114 * 0.4) + 0.5))
    snowy = corrupt(colour, "snow", 1, generator=seeded())
    torch.testing.assert_close(snowy, (0.95 * colour + 0.05 * whiter + flakes).clamp(max=1))
