"""Shifts and the orders in which they are met: nothing is lost, nothing depends on how it is cut."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust import seeding
from deepclust.adaptation import shifts
from deepclust.corruptions import corrupt

CLASSES = 3


def shift(name="clean", severity=0, count=23, seed=0, labelled=True):
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count) if labelled else np.full(count, -1)
    images = random.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    return shifts.Shift(name, severity, images, labels, [f"{name}/{number}" for number in range(count)])


def several():
    return [shift(), shift("contrast", 5), shift("sketch", 0, count=11, seed=1), shift("loose", 0, 7, labelled=False)]


def pairs(stream):
    return list(zip(stream.shift.tolist(), stream.image.tolist(), strict=True))


@pytest.mark.parametrize(("setting", "batch_size"), [("reset", 4), ("continual", 11), ("mixed", 1), ("mixed", 1000)])
def test_every_image_of_every_shift_is_met_exactly_once(setting, batch_size):
    met = shifts.streams(several(), setting, batch_size=batch_size, seed=3)
    order = [pair for stream in met for pair in pairs(stream)]
    everything = [(index, row) for index, each in enumerate(several()) for row in range(len(each.images))]
    assert (sorted(order) if setting == "mixed" else order) == everything
    assert len(met) == (4 if setting == "reset" else 1)
    for stream in met:
        assert [row for batch in stream.batches for row in range(batch.start, batch.stop)] == [
            *range(len(stream.shift))
        ]


def test_mixed_is_a_seeded_order_in_which_batches_hold_images_of_several_shifts_as_floats():
    found = several()
    (one,), (same,), (other,) = (shifts.streams(found, "mixed", batch_size=16, seed=seed) for seed in (5, 5, 6))
    assert pairs(one) == pairs(same) != pairs(other)
    assert all(len(set(one.shift[batch].tolist())) >= 3 for batch in one.batches)
    images = shifts.load(found, one, one.batches[1])
    expected = [found[index].images[row, :, :, 0] / 255 for index, row in pairs(one)[16:32]]
    np.testing.assert_allclose(images[:, 0], expected, atol=1e-7)


def test_correlated_is_sorted_by_class_and_leaves_out_what_has_unlabelled_images():
    found = several()
    found[2].labels[4] = -1
    met = shifts.streams(found, "correlated", batch_size=4, seed=0)
    assert [set(stream.shift.tolist()) for stream in met] == [{0}, {1}]
    for stream in met:
        # Within a class the order is the random one of all streams.
        assert stream.image.tolist() == np.argsort(found[0].labels, kind="stable").tolist()
    assert shifts.streams(found[2:], "correlated", batch_size=4, seed=0) == []


def test_a_last_image_on_its_own_joins_the_batch_before():
    sizes = {(9, 4): [4, 5], (10, 4): [4, 4, 2], (1, 4): [1], (3, 1): [1, 1, 1], (0, 4): []}
    assert {given: [cut.stop - cut.start for cut in shifts.cuts(*given)] for given in sizes} == sizes


@pytest.mark.parametrize(("corruption", "chunk"), [("gaussian_noise", 7), ("glass_blur", 256)])
def test_the_kept_images_are_all_corrupted_at_once_and_rounded_to_8_bits(tmp_path, monkeypatch, corruption, chunk):
    monkeypatch.setattr(shifts, "_CHUNK", chunk)
    clean = shift()
    found = shifts.corrupted(clean, corruption, 4, seed=2, file=tmp_path / "images")
    whole = torch.from_numpy(clean.images[..., 0] / 255).float()[:, None]
    expected = corrupt(whole, corruption, 4, generator=seeding.generator("adapt", 2, corruption))
    assert np.array_equal(found.images[..., 0], np.rint(expected[:, 0].numpy() * np.float32(255)).astype(np.uint8))
    assert found.images.dtype == np.uint8
    assert (found.name, found.severity) == (corruption, 4)
    assert (found.labels is clean.labels, found.paths is clean.paths) == (True, True)


def test_the_file_never_has_a_hole_into_which_a_full_disk_would_let_nothing_be_written(tmp_path, monkeypatch):
    """Where the disk is full, writing into a hole of a memory map kills the process, and at the end is an OSError."""
    clean, file, sizes = shift(count=400), tmp_path / "images", []

    def watched(*arguments, **options):
        sizes.append(file.stat().st_size)
        return corrupt(*arguments, **options)

    monkeypatch.setattr(shifts, "corrupt", watched)
    monkeypatch.setattr(shifts, "_CHUNK", 100)
    shifts.corrupted(clean, "contrast", 5, seed=0, file=file)
    assert len(sizes) == 4
    assert all(size <= before * 100 * 64 for before, size in enumerate(sizes))
    with pytest.raises(OSError, match="No space left on device"):
        shifts.corrupted(clean, "contrast", 5, seed=0, file=Path("/dev/full"))


def test_the_choice_is_seeded_takes_labelled_images_alone_if_there_are_any_and_goes_on_with_more():
    labels = np.random.default_rng(0).integers(0, CLASSES, 61)
    labels[::3] = -1
    chosen, same, other, everything = (
        shifts.choose(labels, count=count, seed=seed).tolist() for count, seed in ((30, 0), (30, 0), (30, 1), (1000, 0))
    )
    assert chosen == same != other
    assert sorted(everything) == np.flatnonzero(labels >= 0).tolist() != everything
    assert everything[:30] == chosen
    assert sorted(shifts.choose(np.full(9, -1), count=20, seed=0).tolist()) == list(range(9)), "without any label all"
