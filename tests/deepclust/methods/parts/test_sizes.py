"""Automatic sizes follow the stated rule, and stay usable at both ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deepclust.errors import ConfigError
from deepclust.methods.parts import sizes


@pytest.mark.parametrize(
    ("rule", "given", "expected"),
    [
        *((sizes.prototypes, given, found) for given, found in [((60_000, 28), 100), ((1_281_167, 224), 4000)]),
        *((sizes.prototypes, given, found) for given, found in [((100_000, 64), 300), ((96, 16), 10), ((20, 16), 4)]),
        *((sizes.key_queue, given, found) for given, found in [((60_000, 256), 4096), ((96, 64), 64)]),
        *((sizes.clusters, given, found) for given, found in [((60_000, 256), (500, 1000, 2000)), ((48, 16), (24,))]),
        *((sizes.clusters, given, found) for given, found in [((10_000, 256), (384, 768, 1536)), ((96, 16), (24, 48))]),
    ],
)
def test_sizes_by_hand(rule: Callable[..., Any], given: tuple[int, int], expected: Any) -> None:
    assert rule(*given) == expected


@pytest.mark.parametrize(
    ("prototypes", "batch", "images", "part", "expected"),
    [(256, 256, 60_000, 256, 0), (257, 256, 60_000, 256, 256), (3000, 256, 60_000, 256, 2816), (90, 32, 300, 32, 64)]
    + [(100, 256, 60_000, 256, 0), (100, 256, 60_000, 64, 256)],  # parts of a batch need one that the whole would not
)
def test_the_queue_brings_what_is_computed_at_once_and_itself_to_the_prototypes(
    prototypes: int, batch: int, images: int, part: int, expected: int
) -> None:
    assert sizes.swav_queue(prototypes, batch, images, part=part) == expected


def test_too_few_images_for_a_batch_are_refused_with_the_batch_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"at least 768 images .* 256, got 500; lower batch_size to at most 166$"):
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
