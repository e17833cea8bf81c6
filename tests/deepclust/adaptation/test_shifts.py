"""Shifts and the orders in which they are met: nothing is lost, nothing depends on how it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepclust import seeding
from deepclust.adaptation import shifts
from deepclust.corruptions import corrupt

CLASSES = 3


def shift(
    name: str = "clean", severity: int = 0, count: int = 23, seed: int = 0, labelled: bool = True
) -> shifts.Shift:
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count) if labelled else np.full(count, -1)
    images = random.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    return shifts.Shift(name, severity, images, labels, [f"{name}/{number}" for number in range(count)])


def several() -> list[shifts.Shift]:
    return [shift(), shift("contrast", 5), shift("sketch", 0, count=11, seed=1), shift("loose", 0, 7, labelled=False)]


def pairs(stream: shifts.Stream) -> list[tuple[int, int]]:
    return list(zip(stream.shift.tolist(), stream.image.tolist(), strict=True))


@pytest.mark.parametrize(("setting", "batch_size"), [("reset", 4), ("continual", 11), ("mixed", 1), ("mixed", 1000)])
def test_every_image_of_every_shift_is_met_exactly_once(setting: str, batch_size: int) -> None:
    found = several()
    met = shifts.streams(found, setting, batch_size=batch_size, seed=3)
    order = [pair for stream in met for pair in pairs(stream)]
    everything = [(index, row) for index, each in enumerate(found) for row in range(len(each.images))]
    assert (sorted(order) if setting == "mixed" else order) == everything
    assert len(met) == (4 if setting == "reset" else 1)
    for stream in met:
        rows = [row for batch in stream.batches for row in range(batch.start, batch.stop)]
        assert rows == list(range(len(stream.shift)))


def test_mixed_is_a_seeded_order_in_which_batches_hold_several_shifts() -> None:
    found = several()
    (one,), (same,), (other,) = (shifts.streams(found, "mixed", batch_size=16, seed=seed) for seed in (5, 5, 6))
    assert pairs(one) == pairs(same)
    assert pairs(one) != pairs(other)
    assert all(len(set(one.shift[batch].tolist())) >= 3 for batch in one.batches)


def test_correlated_is_sorted_by_class_and_leaves_out_what_has_unlabelled_images() -> None:
    found = several()
    found[2].labels[4] = -1
    met = shifts.streams(found, "correlated", batch_size=4, seed=0)
    assert [set(stream.shift.tolist()) for stream in met] == [{0}, {1}]
    for stream in met:
        labels = found[0].labels[stream.image]
        assert sorted(stream.image.tolist()) == list(range(23))
        assert (np.diff(labels) >= 0).all()
        for label in range(CLASSES):  # within a class the order is the random one of all streams
            assert (np.diff(stream.image[labels == label]) > 0).all()
    assert shifts.streams(found[2:], "correlated", batch_size=4, seed=0) == []


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(9, 4, [4, 5]), (10, 4, [4, 4, 2]), (1, 4, [1]), (3, 1, [1, 1, 1]), (0, 4, [])],
)
def test_a_last_image_on_its_own_joins_the_batch_before(count: int, batch_size: int, sizes: list[int]) -> None:
    assert [cut.stop - cut.start for cut in shifts.cuts(count, batch_size)] == sizes


@pytest.mark.parametrize(("corruption", "chunk"), [("gaussian_noise", 7), ("glass_blur", 256)])
def test_the_kept_images_are_all_corrupted_at_once_and_rounded_to_8_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corruption: str, chunk: int
) -> None:
    monkeypatch.setattr(shifts, "_CHUNK", chunk)
    clean = shift()
    found = shifts.corrupted(clean, corruption, 4, seed=2, file=tmp_path / "images")
    whole = torch.from_numpy(clean.images[..., 0] / 255).float()[:, None]
    expected = corrupt(whole, corruption, 4, generator=seeding.generator("adapt", 2, corruption))
    assert np.array_equal(found.images[..., 0], np.rint(expected[:, 0].numpy() * np.float32(255)).astype(np.uint8))
    assert found.images.dtype == np.uint8
    assert (found.name, found.severity) == (corruption, 4)
    assert (found.labels is clean.labels, found.paths is clean.paths) == (True, True)


def test_the_file_never_has_a_hole_into_which_a_full_disk_would_let_nothing_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk is full, writing into a hole of a memory map kills the process, and at the end is an OSError."""
    clean, file, sizes = shift(count=400), tmp_path / "images", []

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        sizes.append(file.stat().st_size)
        return corrupt(*arguments, **options)

    monkeypatch.setattr(shifts, "corrupt", watched)
    monkeypatch.setattr(shifts, "_CHUNK", 100)
    shifts.corrupted(clean, "contrast", 5, seed=0, file=file)
    assert len(sizes) == 4
    assert all(size <= before * 100 * 64 for before, size in enumerate(sizes))
    with pytest.raises(OSError, match="No space left on device"):
        shifts.corrupted(clean, "contrast", 5, seed=0, file=Path("/dev/full"))


def test_batches_are_the_images_of_their_shifts_in_order_as_floats() -> None:
    found = several()
    (stream,) = shifts.streams(found, "mixed", batch_size=10, seed=0)
    batch = stream.batches[1]
    images = shifts.load(found, stream, batch)
    assert images.shape == (10, 1, 8, 8)
    for image, (index, row) in zip(images, pairs(stream)[10:20], strict=True):
        np.testing.assert_allclose(image[0].numpy(), found[index].images[row, :, :, 0] / 255, atol=1e-7)


def test_the_choice_is_seeded_takes_labelled_images_alone_if_there_are_any_and_goes_on_with_more() -> None:
    labels = np.random.default_rng(0).integers(0, CLASSES, 61)
    labels[::3] = -1
    chosen, same, other, everything = (
        shifts.choose(labels, count=count, seed=seed) for count, seed in ((30, 0), (30, 0), (30, 1), (1000, 0))
    )
    assert np.array_equal(chosen, same)
    assert not np.array_equal(chosen, other)
    assert sorted(everything.tolist()) == np.flatnonzero(labels >= 0).tolist()
    assert np.array_equal(everything[:30], chosen)
    assert everything.tolist() != sorted(everything.tolist())
    assert sorted(shifts.choose(np.full(9, -1), count=20, seed=0).tolist()) == list(range(9)), "without any label all"
