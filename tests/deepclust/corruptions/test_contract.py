"""What every corruption keeps: shapes, types, streams, severities, and errors."""

import itertools

import pytest
import torch

from deepclust import corruptions
from deepclust.corruptions import CORRUPTIONS, corrupt
from deepclust.errors import ConfigError, DataError
from tests.deepclust.corruptions.pictures import noisy, scenes, seeded

RANDOM = [
    *("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog"),
    *("elastic_transform", "rotation"),
]
# What does not treat channels alike: noise of its own in each, a tint, or another encoding for colour.
UNLIKE = {"gaussian_noise", "shot_noise", "impulse_noise", "frost", "jpeg_compression"}
every = pytest.mark.parametrize("name", CORRUPTIONS)


def test_the_benchmarks_fifteen_come_in_its_order_and_two_more():
    assert list(CORRUPTIONS) == [
        *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
        *("gaussian_blur", "rotation"),
    ]
    assert all(len(corruption.strengths) == 5 for corruption in CORRUPTIONS.values())


@every
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 20, 33)])
def test_results_are_images_of_the_same_shape_and_digits_and_the_input_stays(name, shape):
    images = noisy(*shape)
    before, single = images.clone(), corrupt(images.float(), name, 5, generator=seeded())
    result = corrupt(images, name, 5, generator=seeded())
    assert (result.shape, result.dtype, single.dtype) == (images.shape, torch.float64, torch.float32)
    assert 0 <= result.min() <= result.max() <= 1
    assert not torch.equal(result, images)
    assert (result - single).abs().quantile(0.9) < 1e-5, "another random number, or another effect"
    if name not in ("shot_noise", "jpeg_compression", "impulse_noise"):
        assert not torch.equal(result, result.float().double()), "rounded to float32"
    result.zero_()
    assert torch.equal(images, before)


@every
def test_a_stream_is_the_same_however_it_is_cut(name, monkeypatch):
    # 21 × 17 values: no multiple of a vector, nor of the block in which torch draws normal numbers.
    images = noisy(8, 3, 21, 17).float()
    whole = corrupt(images, name, 4, generator=seeded())
    for size in (1, 7):
        generator = seeded()
        pieces = [corrupt(piece, name, 4, generator=generator) for piece in images.split(size)]
        assert torch.equal(torch.cat(pieces), whole)
    monkeypatch.setattr(corruptions, "VALUES_AT_ONCE", 2500)
    assert torch.equal(corrupt(images, name, 4, generator=seeded()), whole)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(corrupt(channels_last, name, 4, generator=seeded()), whole)


@every
def test_every_image_takes_as_many_random_numbers_of_its_own_and_the_seed_decides_them(name):
    states = []
    for images in (noisy(3, 3, 12, 10), torch.zeros(3, 3, 12, 10), torch.ones(3, 3, 12, 10)):
        for severity in (1, 5):
            generator = seeded()
            corrupt(images, name, severity, generator=generator)
            states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    assert torch.equal(states[0], seeded().get_state()) == (name not in RANDOM)
    images = scenes(1, 1, 16, 16).expand(12, -1, -1, -1)
    result, again, other = (corrupt(images, name, 5, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(result, again)
    assert torch.equal(result, other) == (name not in RANDOM)
    assert len(torch.unique(result, dim=0)) == ({"rotation": 2}.get(name, 12) if name in RANDOM else 1)


@every
@pytest.mark.parametrize("shape", [(60, 1, 28, 28), (12, 3, 64, 64)])
def test_a_higher_severity_changes_images_more(name, shape):
    images = scenes(*shape)
    changed = [corrupt(images, name, severity, generator=seeded()) for severity in range(1, 6)]
    changes = [(result - images).square().mean().item() for result in changed]
    assert all(weak < strong for weak, strong in itertools.pairwise([1e-7, *changes])), changes


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - UNLIKE))
def test_grey_images_are_changed_as_colour_images_of_equal_channels_are(name):
    grey = scenes(4, 1, 24, 24)
    colour = corrupt(grey.expand(-1, 3, -1, -1), name, 4, generator=seeded())
    expected = corrupt(grey, name, 4, generator=seeded()).expand(-1, 3, -1, -1)
    torch.testing.assert_close(colour, expected, rtol=0, atol=1e-12)


def test_an_unknown_name_severity_or_range_is_an_error_and_an_empty_batch_stays_empty():
    images = noisy(2, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"expected a corruption of gaussian_noise.*got 'spatter'"):
        corrupt(images, "spatter", 1, generator=seeded())
    for severity in (0, 6):
        with pytest.raises(ConfigError, match=f"from 1 to 5, got {severity}"):
            corrupt(images, "contrast", severity, generator=seeded())
    for bad, message in (
        ((images * 255).byte(), "divide 8-bit images by 255"),
        (images * 2, r"in \[0, 1\], got values from"),
        (images - 1, r"in \[0, 1\], got values from"),
        (images / 0 * 0, r"in \[0, 1\], got values from"),
        (images.expand(2, 2, 8, 8), r"got shape \(2, 2, 8, 8\)"),
    ):
        with pytest.raises(DataError, match=message):
            corrupt(bad, "contrast", 1, generator=seeded())
    assert corrupt(images[:0], "rotation", 1, generator=seeded()).shape == (0, 1, 8, 8)
