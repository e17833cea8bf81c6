"""Corruptions against hand-computed cases, scipy, and their invariants."""

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from deepclust.corruptions import CORRUPTIONS, corrupt
from deepclust.errors import ConfigError, DataError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(7), dtype=torch.float64)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (2, 3, 32, 32), (2, 3, 20, 33)])
def test_results_are_images_of_the_same_shape_and_type(name, shape):
    for dtype in (torch.float32, torch.float64):
        images = some_images(*shape).to(dtype)
        result = corrupt(images, name, 5, generator=seeded())
        assert result.shape == images.shape
        assert result.dtype == dtype
        assert result.min() >= 0
        assert result.max() <= 1
        assert not torch.equal(result, images)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_input_is_not_modified_and_not_returned(name):
    images = some_images(4, 3, 16, 16)
    before = images.clone()
    result = corrupt(images, name, 3, generator=seeded())
    result.zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_stream_is_the_same_however_it_is_cut(name):
    # 9 × 9 values: no multiple of the block in which torch draws normal numbers.
    images = some_images(7, 1, 9, 9).float()
    whole = corrupt(images, name, 4, generator=seeded())
    for size in (1, 2, 5):
        generator = seeded()
        pieces = [corrupt(piece, name, 4, generator=generator) for piece in images.split(size)]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("name", ["gaussian_noise", "rotation"])
def test_each_image_has_randomness_of_its_own_and_the_seed_decides_it(name):
    images = some_images(1, 1, 16, 16).expand(12, -1, -1, -1)
    result = corrupt(images, name, 3, generator=seeded())
    assert torch.equal(result, corrupt(images, name, 3, generator=seeded()))
    assert not torch.equal(result, corrupt(images, name, 3, generator=seeded(1)))
    assert len(torch.unique(result, dim=0)) == (12 if name == "gaussian_noise" else 2)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("side", [28, 64])
def test_a_higher_severity_changes_images_more(name, side):
    # A smooth picture in mid-grey, so that neither clipping nor the pattern's own period hides a stronger change.
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    picture = 0.35 + 0.2 * torch.exp(-((x - 0.5) ** 2) / 0.002) + 0.1 * y
    images = picture.expand(8, 1, side, side)
    changes = [
        (corrupt(images, name, severity, generator=seeded()) - images).square().mean().item()
        for severity in range(1, 6)
    ]
    assert all(weak < strong for weak, strong in itertools.pairwise(changes)), changes


def test_noise_has_the_stated_standard_deviation():
    images = torch.full((50, 1, 32, 32), 0.5, dtype=torch.float64)
    for severity, std in enumerate([0.04, 0.06, 0.08, 0.09, 0.10], start=1):
        noise = corrupt(images, "gaussian_noise", severity, generator=seeded()) - images
        assert noise.std().item() == pytest.approx(std, rel=0.02)
        assert abs(noise.mean().item()) < 0.002


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (40, 24)])
def test_blur_is_scipys_with_sigma_growing_with_the_shorter_side(height, width):
    images = some_images(2, 3, height, width)
    sigma = 1.0 * min(height, width) / 32
    result = corrupt(images, "gaussian_blur", 5, generator=seeded()).numpy()
    radius = math.ceil(4 * sigma)
    truth = ndimage.gaussian_filter(images.numpy(), sigma, mode="nearest", radius=radius, axes=(2, 3))
    np.testing.assert_allclose(result, truth, atol=1e-12)


def test_contrast_keeps_a_share_of_the_distance_to_each_channels_mean():
    images = torch.tensor([[[[0.0, 1.0]], [[0.2, 0.4]], [[0.5, 0.5]]]])
    result = corrupt(images, "contrast", 2, generator=seeded())
    truth = torch.tensor([[[[0.25, 0.75]], [[0.25, 0.35]], [[0.5, 0.5]]]])
    torch.testing.assert_close(result, truth)


def test_brightness_adds_to_the_value_of_hsv():
    pixels = [(0.2, 0.4, 0.1), (0.0, 0.0, 0.0), (0.9, 0.5, 0.95), (0.3, 0.3, 0.3), (1.0, 1.0, 1.0), (1e-3, 0.0, 0.0)]
    truth = []
    for red, green, blue in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        truth.append(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1)))
    images = torch.tensor(pixels, dtype=torch.float64).T.reshape(1, 3, 1, -1)
    result = corrupt(images, "brightness", 5, generator=seeded()).reshape(3, -1).T
    torch.testing.assert_close(result, torch.tensor(truth, dtype=torch.float64))


def test_brightness_of_grey_images_is_a_sum():
    images = some_images(2, 1, 8, 8)
    images[0, 0, 0, 0] = 0
    result = corrupt(images, "brightness", 1, generator=seeded())
    torch.testing.assert_close(result, (images + 0.05).clamp(max=1))


@pytest.mark.parametrize(("height", "width"), [(21, 21), (16, 24)])
def test_rotation_is_scipys_rotation_to_one_side_or_the_other(height, width):
    images = some_images(6, 1, height, width)
    result = corrupt(images, "rotation", 2, generator=seeded()).numpy()
    sides = []
    for image, rotated in zip(images.numpy(), result, strict=True):
        # scipy's `reflect` mirrors at the pixels' edges, as grid_sample's `reflection` without aligned corners does.
        truths = [ndimage.rotate(image[0], angle, reshape=False, order=1, mode="reflect") for angle in (-16.0, 16.0)]
        distances = [np.abs(rotated[0] - truth).max() for truth in truths]
        assert min(distances) < 1e-9
        sides.append(int(np.argmin(distances)))
    assert set(sides) == {0, 1}


def test_an_unknown_name_severity_or_range_is_an_error():
    images = some_images(2, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"expected a corruption of gaussian_noise.*got 'fog'"):
        corrupt(images, "fog", 1, generator=seeded())
    for severity in (0, 6):
        with pytest.raises(ConfigError, match=f"from 1 to 5, got {severity}"):
            corrupt(images, "contrast", severity, generator=seeded())
    with pytest.raises(DataError, match="divide 8-bit images by 255"):
        corrupt((images * 255).byte(), "contrast", 1, generator=seeded())
    for bad in (images * 2, images - 1, images / 0 * 0):
        with pytest.raises(DataError, match=r"in \[0, 1\], got values from"):
            corrupt(bad, "contrast", 1, generator=seeded())
    with pytest.raises(DataError, match=r"got shape \(2, 2, 8, 8\)"):
        corrupt(images.expand(2, 2, 8, 8), "contrast", 1, generator=seeded())


def test_an_empty_batch_stays_empty():
    images = torch.zeros(0, 1, 8, 8)
    result = corrupt(images, "rotation", 1, generator=seeded())
    assert result.shape == (0, 1, 8, 8)
    assert result is not images
