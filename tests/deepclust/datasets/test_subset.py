"""Some of a source's images, drawn by their names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from deepclust.datasets import subset
from deepclust.images.decode import Inspected
from deepclust.images.reading import Reading
from deepclust.images.source import Source


class Numbered(Source):
    """Image i is one pixel of value i."""

    def inspect(self, index: int, reading: Reading) -> Inspected:
        raise NotImplementedError

    def read(
        self, index: int, reading: Reading, *, image_sizes: Sequence[int], channels: int
    ) -> list[NDArray[np.uint8]]:
        return [np.full((1, 1, 1), index, np.uint8)]


def source(readable: int, skipped: int) -> Source:
    return Numbered(
        name="numbers",
        classes=["a", "b"],
        paths=[f"{number}.png" for number in range(readable)],
        labels=np.arange(readable) % 2,
        sides=["train" if number % 3 else "test" for number in range(readable)],
        published=True,
        skipped=[{"path": f"{number}.bad", "reason": "junk"} for number in range(skipped)],
    )


def test_every_drawn_image_keeps_its_pixels_label_and_side() -> None:
    whole = source(200, 0)
    found = subset.drawn(whole, 50, seed=0)
    assert len(found.paths) == 50
    assert not found.published
    assert found.sides is not None
    for index, path in enumerate(found.paths):
        number = int(path.removesuffix(".png"))
        (pixels,) = found.read(index, Reading(resize="crop"), image_sizes=[1], channels=1)
        assert (pixels.item(), found.labels[index]) == (number, number % 2)
        assert found.sides[index] == ("train" if number % 3 else "test")


def test_one_image_more_changes_at_most_one_and_another_seed_draws_others() -> None:
    before, after = (set(subset.drawn(source(count, 0), 50, seed=0).paths) for count in (200, 201))
    assert len(before - after) <= 1
    assert set(subset.drawn(source(200, 0), 50, seed=1).paths) != before


def test_the_share_of_skipped_files_stays_what_it_was() -> None:
    found = subset.drawn(source(3000, 1000), 1000, seed=0)
    assert len(found.paths) + len(found.skipped) == 1000
    assert len(found.skipped) == pytest.approx(250, abs=4 * (1000 * 0.25 * 0.75) ** 0.5)


def test_a_source_that_has_no_more_is_left_as_it_is() -> None:
    whole = source(3, 1)
    assert subset.drawn(whole, 4, seed=0) is whole
