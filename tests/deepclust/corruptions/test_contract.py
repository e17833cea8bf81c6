"""What every corruption keeps: shapes, types, streams, severities, and errors."""

import itertools

import pytest
import torch

from deepclust import corruptions
from deepclust.corruptions import CORRUPTIONS, corrupt
from deepclust.errors import ConfigError, DataError
from tests.deepclust.corruptions.pictures import noisy, scenes, seeded

PLAIN = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur"}
every = pytest.mark.parametrize("name", CORRUPTIONS)


@every
def test_results_are_images_of_the_same_shape_and_digits_and_the_input_stays(name):
    images = noisy(2, 3, 20, 33)
    before, single = images.clone(), corrupt(images.float(), name, 5, generator=seeded())
    result = corrupt(images, name, 5, generator=seeded())
    assert (result.shape, result.dtype, single.dtype) == (images.shape, torch.float64, torch.float32)
    assert 0 <= result.min() <= result.max() <= 1
    assert (result - single).abs().quantile(0.9) < 1e-5, "another random number, or another effect"
    result.zero_()
    assert torch.equal(images, before)


@every
def test_a_stream_is_the_same_however_it_is_cut(name, monkeypatch):
    # 21 × 17 values: no multiple of a vector, nor of the block in which torch draws normal numbers.
    images = noisy(8, 3, 21, 17).float()
    whole = corrupt(images, name, 4, generator=seeded())
    generator = seeded()
    pieces = [corrupt(piece, name, 4, generator=generator) for piece in images.split(3)]
    assert torch.equal(torch.cat(pieces), whole)
    monkeypatch.setattr(corruptions, "VALUES_AT_ONCE", 2500)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(corrupt(channels_last, name, 4, generator=seeded()), whole)


@every
def test_every_image_takes_as_many_random_numbers_of_its_own_and_the_seed_decides_them(name):
    states = []
    for images, severity in ((noisy(3, 3, 12, 10), 1), (torch.zeros(3, 3, 12, 10), 5)):
        generator = seeded()
        corrupt(images, name, severity, generator=generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], seeded().get_state()) == (name in PLAIN)
    images = scenes(1, 1, 16, 16).expand(12, -1, -1, -1)
    result, other = (corrupt(images, name, 5, generator=seeded(seed)) for seed in (0, 1))
    assert torch.equal(result, other) == (name in PLAIN)
    assert len(torch.unique(result, dim=0)) == (1 if name in PLAIN else {"rotation": 2}.get(name, 12))


@every
def test_a_higher_severity_changes_images_more(name):
    images = scenes(30, 1, 28, 28)
    changed = [corrupt(images, name, severity, generator=seeded()) for severity in range(1, 6)]
    changes = [(result - images).square().mean().item() for result in changed]
    assert all(weak < strong for weak, strong in itertools.pairwise([1e-7, *changes])), changes


def test_an_unknown_name_severity_or_range_is_an_error_and_an_empty_batch_stays_empty():
    images = noisy(2, 1, 8, 8)
    for bad, name, severity, error, message in (
        (images, "spatter", 1, ConfigError, r"expected a corruption of gaussian_noise.*got 'spatter'"),
        (images, "contrast", 6, ConfigError, "from 1 to 5, got 6"),
        ((images * 255).byte(), "contrast", 1, DataError, "divide 8-bit images by 255"),
        (images * 2, "contrast", 1, DataError, r"in \[0, 1\], got values from"),
        (images / 0 * 0, "contrast", 1, DataError, r"in \[0, 1\], got values from"),
        (images.expand(2, 2, 8, 8), "contrast", 1, DataError, r"got shape \(2, 2, 8, 8\)"),
    ):
        with pytest.raises(error, match=message):
            corrupt(bad, name, severity, generator=seeded())
    assert corrupt(images[:0], "rotation", 1, generator=seeded()).shape == (0, 1, 8, 8)
