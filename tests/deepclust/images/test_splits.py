"""Draws by what an image is."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from deepclust.images import splits

IDS = [hashlib.sha256(bytes([number % 251, number // 251])).hexdigest() for number in range(4000)]


def draw(group_of: list[str], fraction: float, seed: int = 0, what: str = "test") -> list[bool]:
    return splits.drawn(group_of, fraction, seed=seed, what=what).tolist()


def test_a_draw_is_the_share_that_was_asked_for_and_seeds_and_purposes_are_independent() -> None:
    found = np.array([draw(IDS, 0.2), draw(IDS, 0.2, seed=1), draw(IDS, 0.2, what="heldout")])
    assert found.mean(1) == pytest.approx([0.2] * 3, abs=4 * (0.2 * 0.8 / 4000) ** 0.5)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (found[first] & found[second]).mean() == pytest.approx(0.04, abs=4 * (0.04 * 0.96 / 4000) ** 0.5)


def test_an_image_is_drawn_by_its_own_number_whatever_else_is_there() -> None:
    """The number is computed here anew: the first 53 bits of SHA-256 of seed, purpose and id."""
    numbers = [int(hashlib.sha256(f"7/test/{one}".encode()).hexdigest()[:16], 16) / 2**64 for one in IDS]
    assert draw(IDS, 0.2, seed=7) == [number < 0.2 for number in numbers]
    assert draw(IDS[::-2], 0.2, seed=7) == draw(IDS, 0.2, seed=7)[::-2]
    smaller, larger = draw(IDS, 0.2), draw(IDS, 0.3)
    assert all(after for before, after in zip(smaller, larger, strict=True) if before)


def test_of_several_groups_some_are_drawn_and_some_left_at_any_share() -> None:
    assert [sum(draw(IDS[:5], share)) for share in (1e-9, 1 - 1e-9)] == [1, 4]
    assert draw(IDS[:1], 1e-9) == [False]
    assert draw(["a", "b", "a", "a"], 1e-9) in ([True, False, True, True], [False, True, False, False])
    assert draw([], 0.5) == []


def test_identical_images_are_one_group_named_by_its_smallest_id() -> None:
    assert splits.groups(["d", "b", "c", "b", "a"], [b"1", b"2", b"1", b"2", b"3"]) == ["c", "b", "c", "b", "a"]
