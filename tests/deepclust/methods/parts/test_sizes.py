"""Automatic sizes follow the stated rule, and stay usable at both ends."""

from __future__ import annotations

import pytest

from deepclust.config import as_dict
from deepclust.errors import ConfigError
from deepclust.methods import config_class
from deepclust.methods.parts import sizes
from deepclust.methods.parts.options import TrainedConfig


def test_sizes_by_hand() -> None:
    given = [(60_000, 28), (50_000, 32), (1_281_167, 224), (100_000, 64), (96, 16), (20, 16)]
    assert [sizes.prototypes(images, side) for images, side in given] == [100, 100, 4000, 300, 10, 4]
    given = [(60_000, 256), (10_000, 256), (96, 16), (48, 16)]
    assert [sizes.clusters(*each) for each in given] == [(500, 1000, 2000), (384, 768, 1536), (24, 48), (24,)]
    assert [sizes.key_queue(*each) for each in [(60_000, 256), (50_000, 512), (96, 64)]] == [4096, 3584, 64]


def test_the_queue_brings_itself_and_what_is_computed_at_once_to_the_prototypes() -> None:
    queues = [sizes.swav_queue(prototypes, 256, 60_000, part=256) for prototypes in (100, 256, 257, 3000)]
    assert queues == [0, 0, 256, 2816]
    assert sizes.swav_queue(90, 32, 300, part=32) == 64
    assert sizes.swav_queue(100, 256, 60_000, part=64) == 256, "parts of a batch need one that the whole would not"


def test_too_few_images_for_a_batch_are_refused_with_the_batch_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"at least 768 images .* 256, got 500; lower batch_size to at most 166$"):
        sizes.clusters(500, 256)
    assert sizes.clusters(500, 166)
    with pytest.raises(ConfigError, match=r"got 5; add images, to at least 6$"):
        sizes.clusters(5, 2)
    assert sizes.clusters(6, 2) == (3,)


@pytest.mark.parametrize(("images", "batch"), [(64, 16), (777, 256), (12_345, 2), (10_000_000, 256)])
def test_automatic_sizes_fit_each_other(images: int, batch: int) -> None:
    clusters = sizes.clusters(images, batch)
    assert 1 <= sizes.negatives(clusters, batch) <= min(clusters) - batch
    assert max(clusters) <= images
    assert list(clusters) == sorted(set(clusters))
    assert sizes.key_queue(images, batch) % batch == 0 < sizes.key_queue(images, batch)
    prototypes = sizes.prototypes(images, 32)
    assert sizes.swav_queue(prototypes, batch, images, part=batch) % batch == 0
    assert 2 <= prototypes <= images


@pytest.mark.parametrize("method", ["swav", "deepcluster_v2", "moco", "pcl", "simsiam"])
def test_no_automatic_size_exceeds_the_images_however_few(method: str) -> None:
    short = {"swav": {"freeze_prototypes_steps": 0}, "moco": {"key_groups": 1}, "pcl": {"key_groups": 1}}
    for images in range(6, 60):
        options = config_class(method)(batch_size=max(2, images // 2 * 2 // 3), **short.get(method, {}))
        assert isinstance(options, TrainedConfig)
        found = as_dict(options.sized(images=images, image_size=32))
        for name in ("prototypes", "queue_length", "clusters", "negatives"):
            value = found.get(name, 0)
            assert max(value if isinstance(value, list) else [value]) <= images
        with pytest.raises(
            ConfigError, match=rf"got {images};|at most {images}, the training images; got {images + 1}"
        ):
            options.replaced(batch_size=images + 1).sized(images=images, image_size=32)
