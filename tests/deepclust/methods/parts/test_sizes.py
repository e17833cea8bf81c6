"""Automatic sizes follow the stated rule, and stay usable at both ends."""

from __future__ import annotations

import pytest

from deepclust.errors import ConfigError
from deepclust.methods.parts import sizes


@pytest.mark.parametrize(
    ("images", "side", "expected"),
    [(60_000, 28, 100), (50_000, 32, 100), (1_281_167, 224, 4000), (100_000, 64, 300), (96, 16, 10), (20, 16, 4)],
)
def test_prototypes_by_hand(images: int, side: int, expected: int) -> None:
    assert sizes.prototypes(images, side) == expected


@pytest.mark.parametrize(
    ("prototypes", "batch", "images", "expected"),
    [(256, 256, 60_000, 0), (257, 256, 60_000, 256), (3000, 256, 60_000, 2816), (90, 32, 300, 64)],
)
def test_the_queue_brings_batch_and_queue_to_the_prototypes(
    prototypes: int, batch: int, images: int, expected: int
) -> None:
    assert sizes.swav_queue(prototypes, batch, images, part=batch) == expected


@pytest.mark.parametrize(("images", "batch", "expected"), [(60_000, 256, 4096), (50_000, 512, 3584), (96, 64, 64)])
def test_keys_by_hand(images: int, batch: int, expected: int) -> None:
    assert sizes.key_queue(images, batch) == expected


@pytest.mark.parametrize(
    ("images", "batch", "expected"),
    [(60_000, 256, (500, 1000, 2000)), (10_000, 256, (384, 768, 1536)), (96, 16, (24, 48)), (48, 16, (24,))],
)
def test_clusters_by_hand(images: int, batch: int, expected: tuple[int, ...]) -> None:
    assert sizes.clusters(images, batch) == expected


def test_too_few_images_for_a_batch_are_refused_with_the_batch_that_fits() -> None:
    with pytest.raises(
        ConfigError, match=r"at least 768 images .* batches of 256, got 500; lower batch_size to at most 166$"
    ):
        sizes.clusters(500, 256)
    assert sizes.clusters(500, 166)


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


def test_parts_of_a_batch_need_a_queue_that_the_whole_would_not() -> None:
    assert sizes.swav_queue(100, 256, 60_000, part=256) == 0
    assert sizes.swav_queue(100, 256, 60_000, part=64) == 256
