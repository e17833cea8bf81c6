"""Digital corruptions against colorsys, scipy, Pillow and cases worked out by hand."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from deepclust.corruptions import corrupt, digital
from tests.deepclust.corruptions.pictures import noisy, scenes, seeded


def test_contrast_keeps_a_share_of_the_distance_to_each_channels_mean():
    images = noisy(3, 3, 13, 21)  # sizes that are no power of two
    mean = images.mean(dim=(2, 3), keepdim=True)
    result = corrupt(images, "contrast", 5, generator=seeded())
    torch.testing.assert_close(result, mean + 0.15 * (images - mean))


def test_brightness_adds_to_the_value_of_hsv_and_for_grey_images_to_the_value():
    pixels = [(0.2, 0.4, 0.1), (0.0, 0.0, 0.0), (0.9, 0.5, 0.95), (0.3, 0.3, 0.3), (1.0, 1.0, 1.0), (1e-3, 0.0, 0.0)]
    truth = []
    for red, green, blue in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        truth.append(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1)))
    images = torch.tensor(pixels, dtype=torch.float64).T.reshape(1, 3, 1, -1)
    result = corrupt(images, "brightness", 5, generator=seeded()).reshape(3, -1).T
    torch.testing.assert_close(result, torch.tensor(truth, dtype=torch.float64))
    grey = images[:, :1]
    torch.testing.assert_close(corrupt(grey, "brightness", 1, generator=seeded()), (grey + 0.05).clamp(max=1))


def test_the_affine_part_moves_three_points_as_drawn_and_no_strength_moves_nothing():
    height, width, move = 40, 48, 3.0
    images = scenes(1, 1, height, width)
    assert torch.equal(digital.elastic_transform(images.float(), (0.0, 2.0, 0.0), seeded()), images.float())
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


@pytest.mark.parametrize(("side", "std", "sigma"), [(64, 1.5, 1.0), (16, 1.0, 0.0)])
def test_the_field_has_the_stated_standard_deviation_at_every_size(side, std, sigma):
    # A ramp says how far each pixel was moved; the middle is clear of the edges.
    ramp = (torch.arange(side, dtype=torch.float64) / side).expand(1024 // side, 1, side, side)
    margin = 2 + side // 6
    for images in (ramp, ramp.mT):
        moved = (digital.elastic_transform(images, (std, sigma, 0.0), seeded()) - images) * side
        inner = moved[:, :, margin:-margin, margin:-margin]
        assert inner.std().item() == pytest.approx(std * side / 32, rel=0.12)


def test_pixelate_is_pillows_box_down_and_up_again_and_joins_the_middle_two_of_eight():
    images = noisy(1, 1, 64, 80).float()
    for severity, share in ((1, 0.95), (3, 0.85), (5, 0.65)):
        block = 1 + (1 / share - 1) * 2
        small = Image.fromarray(images[0, 0].numpy()).resize((int(80 / block), int(64 / block)), Image.Resampling.BOX)
        result = corrupt(images, "pixelate", severity, generator=seeded())[0, 0].numpy()
        np.testing.assert_allclose(result, np.asarray(small.resize((80, 64), Image.Resampling.BOX)), atol=1e-6)
    truth = images[..., :8, :8].clone()
    result = corrupt(truth, "pixelate", 5, generator=seeded())
    truth[:, :, 3:5] = truth[:, :, 3:5].mean(dim=2, keepdim=True)
    truth[:, :, :, 3:5] = truth[:, :, :, 3:5].mean(dim=3, keepdim=True)
    torch.testing.assert_close(result, truth)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 40)])
def test_jpeg_is_pillows_at_the_stated_quality(shape):
    images = scenes(2, *shape).float()
    for severity, quality in enumerate([80, 65, 58, 50, 40], start=1):
        result = corrupt(images, "jpeg_compression", severity, generator=seeded())
        for image, compressed in zip(images, result, strict=True):
            pixels = (image * 255).round().byte().permute(1, 2, 0).squeeze(2).numpy()
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=quality)
            truth = np.atleast_3d(np.asarray(Image.open(file))) / 255
            np.testing.assert_allclose(compressed.permute(1, 2, 0).numpy(), truth, atol=1e-6)


def test_rotation_is_scipys_rotation_to_one_side_or_the_other():
    images = noisy(6, 1, 16, 24)
    result = corrupt(images, "rotation", 2, generator=seeded()).numpy()
    sides = []
    for image, rotated in zip(images.numpy(), result, strict=True):
        # scipy's `reflect` mirrors at the pixels' edges, as grid_sample's `reflection` without aligned corners does.
        truths = [ndimage.rotate(image[0], angle, reshape=False, order=1, mode="reflect") for angle in (-16.0, 16.0)]
        distances = [np.abs(rotated[0] - truth).max() for truth in truths]
        assert min(distances) < 1e-9
        sides.append(int(np.argmin(distances)))
    assert set(sides) == {0, 1}
