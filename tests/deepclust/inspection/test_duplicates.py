"""Planted copies are found, other pictures are not; counts by hand."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from deepclust.clustering import neighbours
from deepclust.inspection import duplicates, grey
from tests.deepclust.inspection.pictures import resized, textures

Pictures = NDArray[np.uint8]
SIDE = 64


def recompressed(picture: Pictures) -> Pictures:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=40)
    return np.asarray(Image.open(file))


def cropped(picture: Pictures, top: int, left: int) -> Pictures:
    part = round(0.9 * SIDE)
    return resized(picture[top : top + part, left : left + part], SIDE)


WAYS: dict[str, Callable[[Pictures], Pictures]] = {
    "resized": lambda picture: resized(resized(picture, SIDE // 2), SIDE),
    "recompressed": recompressed,
    "mirrored": lambda picture: picture[:, ::-1],
    "cropped": lambda picture: cropped(picture, 6, 0),
    "cropped elsewhere": lambda picture: cropped(picture, 2, 5),
    "mirrored and cropped": lambda picture: cropped(picture[:, ::-1], 0, 6),
}


def graph_of(sources: list[int], count: int = 5) -> torch.Tensor:
    """Neighbours by features that are nearly the same for pictures of one source."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(max(sources) + 1, 16))
    features = centres[sources] + 0.01 * random.normal(size=(len(sources), 16))
    return neighbours.graph(torch.from_numpy(features).float(), count).indices


def find(train: Pictures, test: Pictures, sources: list[int]) -> duplicates.Duplicates:
    return duplicates.find(train, test, graph_of(sources))


def test_the_same_pixels_are_exact_copies_within_and_between_train_and_test() -> None:
    pictures = textures(8, SIDE)
    train, test = pictures[[0, 1, 2, 1, 3]], pictures[[4, 2, 5, 1]]
    found = find(train, test, [0, 1, 2, 1, 3, 4, 2, 5, 1])
    both = np.concatenate([train, test])
    equal = {(i, j) for j in range(9) for i in range(j) if (both[i] == both[j]).all()}
    assert equal == {(1, 3), (1, 8), (3, 8), (2, 6)}
    assert found.pairs.tolist() == [[1, 3], [1, 8], [2, 6]]
    assert found.exact.all()
    assert [group.tolist() for group in found.members()] == [[1, 3, 8], [2, 6]]
    assert found.groups.tolist() == [-1, 0, 1, 0, -1, -1, 1, -1, 0]


@pytest.mark.parametrize("way", WAYS)
def test_a_changed_copy_is_found_and_no_other_picture(way: str) -> None:
    train = textures(30, SIDE)
    test = np.stack([WAYS[way](picture) for picture in train[:20]])
    found = find(train, test, [*range(30), *range(20)])
    assert found.pairs.tolist() == [[number, 30 + number] for number in range(20)]
    assert not found.exact.any()
    assert found.between() == (20, 20)


def test_copies_in_grey_at_28_pixels_are_found() -> None:
    train = textures(20, 28, channels=1)
    found = find(train, train[:, :, ::-1], [*range(20), *range(20)])
    assert found.pairs.tolist() == [[number, 20 + number] for number in range(20)]


def test_garments_of_one_cut_with_different_prints_are_no_copies() -> None:
    shirts = np.zeros((40, 28, 28, 1), np.uint8)
    shirts[:, 3:26, 6:22], shirts[:, 3:10, 1:27] = 180, 180
    prints = np.random.default_rng(0).integers(0, 70, (40, 8, 8, 1))
    shirts[:, 10:18, 10:18] -= prints.astype(np.uint8)
    assert not len(duplicates.find(shirts, shirts[:0], graph_of([0] * 40, 10)).pairs)


def test_pictures_that_agree_in_all_but_details_are_not_even_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Image.Image] = []
    phash = duplicates.imagehash.phash

    def counted(image: Image.Image, hash_size: int) -> Any:
        hashed.append(image)
        return phash(image, hash_size)

    monkeypatch.setattr(duplicates.imagehash, "phash", counted)
    random = np.random.default_rng(0)
    smooth = resized(random.integers(80, 170, (3, 3, 3), dtype=np.uint8), SIDE)
    train = smooth + random.integers(0, 40, (10, 32, 32, 1), dtype=np.uint8).repeat(2, 1).repeat(2, 2)
    duplicates.find(train, train[:1], graph_of([0] * 11, 9))
    assert not hashed
    duplicates.find(train[:1], train[:1, :, ::-1], graph_of([0] * 2, 1))
    assert len(hashed) == 2


def test_a_picture_in_which_something_else_is_shown_is_no_copy() -> None:
    train = textures(10, SIDE)
    test = train.copy()
    test[:, 20:40, 20:40] = (test[:, 20:40, 20:40] // 2) + 90
    assert not len(find(train, test, [*range(10), *range(10)]).pairs)


def test_copies_are_sought_among_neighbours_only() -> None:
    train = textures(10, SIDE)
    apart = graph_of([*range(20)], 3)
    linked = {tuple(sorted((i, int(j)))) for i in range(20) for j in apart[i]}
    expected = [[i, i + 10] for i in range(10) if (i, i + 10) in linked]
    assert len(expected) < 10
    assert duplicates.find(train, train[:, :, ::-1], apart).pairs.tolist() == expected


def test_many_exact_copies_do_not_hide_a_near_one() -> None:
    one, other = textures(2, SIDE)
    train = np.stack([*[one] * 6, *[one[:, ::-1]] * 6, other])
    found = duplicates.find(train, train[:0], graph_of([0] * 12 + [1], 12))
    near = found.pairs[~found.exact]
    assert near.tolist() == [[0, 6]]
    assert found.within_train() == (1, 12)
    assert found.kept().tolist() == [0, 12]


def test_counts_and_what_is_kept_are_those_by_hand() -> None:
    groups = np.array([0, -1, 0, 1, 2, 2, -1, 0, 3, 3, 1, -1])
    found = duplicates.Duplicates(
        pairs=np.array([[0, 2], [0, 7], [3, 10], [4, 5], [8, 9]]), exact=np.ones(5, bool), groups=groups, train=7
    )
    assert found.within_train() == (2, 4)  # 0 and 2, 4 and 5
    assert found.within_test() == (1, 2)  # 8 and 9
    assert found.between() == (2, 2)  # 7 and 10 have a copy in train
    assert found.kept().tolist() == [0, 1, 3, 4, 6]
    assert [group.tolist() for group in found.members()] == [[0, 2, 7], [3, 10], [4, 5], [8, 9]]


def test_a_copy_of_a_copy_is_in_its_group_and_groups_are_numbered_by_their_first_image() -> None:
    pairs = np.array([[5, 6], [0, 4], [4, 7], [2, 3]])
    assert duplicates._groups(pairs, 9).tolist() == [0, -1, 1, 1, 0, 2, 2, 0, -1]


def test_memory_maps_are_read_in_blocks_left_as_they_were_and_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = textures(20, SIDE)
    test = np.stack([cropped(picture, 3, 4) for picture in train])
    expected = find(train, test, [*range(20), *range(20)])
    np.save(tmp_path / "train.npy", train)
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    monkeypatch.setattr(grey, "_VALUES_AT_ONCE", 3 * SIDE * SIDE * 3)
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 7)
    found = find(mapped, test, [*range(20), *range(20)])
    assert len(expected.pairs) >= 20
    np.testing.assert_array_equal(found.pairs, expected.pairs)
    np.testing.assert_array_equal(found.groups, expected.groups)
    np.testing.assert_array_equal(mapped, textures(20, SIDE))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images_have_no_copies(count: int) -> None:
    pictures = textures(2, SIDE)[:count]
    near = torch.tensor([[1], [0]]) if count == 2 else torch.empty(count, 0, dtype=torch.int64)
    found = duplicates.find(pictures, pictures[:0], near)
    assert not len(found.pairs)
    assert found.members() == []
    assert (found.within_train(), found.within_test(), found.between()) == ((0, 0), (0, 0), (0, 0))
    assert found.kept().tolist() == list(range(count))


@pytest.mark.parametrize("level", [0, 77, 255])
def test_images_that_are_all_the_same_are_one_group(level: int) -> None:
    blank = np.full((12, 20, 20, 3), level, np.uint8)
    found = duplicates.find(blank[:8], blank[8:], neighbours.graph(torch.ones(12, 4), 5).indices)
    assert found.exact.all()
    assert (found.within_train(), found.within_test(), found.between()) == ((1, 8), (1, 4), (1, 4))
    assert found.kept().tolist() == [0]


def test_blank_images_of_different_shades_are_no_copies() -> None:
    blank = np.repeat(np.arange(0, 240, 20, dtype=np.uint8), 400).reshape(12, 20, 20, 1)
    assert not len(duplicates.find(blank, blank[:0], neighbours.graph(torch.ones(12, 4), 5).indices).pairs)
