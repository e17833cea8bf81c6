"""NumPy stacks as a data set, in MedMNIST's layout and without labels."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepclust.datasets import stacks
from deepclust.errors import DataError
from deepclust.images import depth, find
from deepclust.images.reading import Reading

RNG = np.random.default_rng(0)


def images(count: int, *shape: int, dtype: str = "uint8") -> np.ndarray:
    return RNG.integers(0, 256, (count, *(shape or (28, 28))), dtype=np.uint8).astype(dtype)


def load(root: Path) -> stacks.Stacks:
    found = stacks.load(str(root), find.images(root))
    assert found is not None
    return found


def labelled(found: stacks.Stacks) -> dict[str, str | None]:
    names = [*found.classes, None]
    return {path: names[number] for path, number in zip(found.paths, found.labels, strict=True)}


def test_medmnists_layout_is_train_and_test_with_labels_and_val_is_not_used_beside_them(tmp_path: Path) -> None:
    parts = {"train": images(5, 28, 28, 3), "val": images(3, 28, 28, 3), "test": images(2, 28, 28, 3)}
    labels = {"train": [[1], [10], [2], [1], [0]], "val": [[1]] * 3, "test": [[10], [2]]}
    arrays = {f"{name}_images": part for name, part in parts.items()}
    arrays |= {f"{name}_labels": np.array(part, np.uint8) for name, part in labels.items()}
    np.savez_compressed(tmp_path / "pathmnist.npz", **arrays)
    found = load(tmp_path)
    assert (found.classes, found.channels) == (["0", "1", "2", "10"], None)
    assert found.warnings == ["not used beside train and test: val of pathmnist.npz"]
    expected = {f"pathmnist.npz/train/{index:06}": label for index, label in enumerate(["1", "10", "2", "1", "0"])}
    assert labelled(found) == expected | {"pathmnist.npz/test/000000": "10", "pathmnist.npz/test/000001": "2"}
    assert found.sides == ["train"] * 5 + ["test"] * 2
    for index, expected_image in enumerate([*parts["train"], *parts["test"]]):
        assert np.array_equal(found.read(index, Reading(), image_sizes=[28], channels=3)[0], expected_image)
        seen = found.inspect(index, Reading())
        assert (seen.width, seen.height, seen.measured) == (28, 28, None)
    assert len({found.inspect(index, Reading()).sha256 for index in range(7)}) == 7


def test_val_is_the_test_side_where_there_is_no_test_and_without_either_the_sides_are_open(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_images=images(3), val_images=images(2), train_labels=np.array(["b", "", "a"]))
    found = load(tmp_path)
    assert found.sides == ["train"] * 3 + ["test"] * 2
    assert list(labelled(found).values()) == ["b", None, "a", None, None]
    assert found.channels == 1
    np.savez(tmp_path / "a.npz", train_images=images(3), train_labels=np.array([4, -1, 7]))
    found = load(tmp_path)
    assert (found.sides, found.classes, found.labels.tolist()) == (None, ["4", "7"], [0, -1, 1])


def test_npy_files_are_unlabelled_training_images_of_any_depth(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    deep = RNG.integers(0, 4096, (4, 8, 6), dtype=np.uint16)
    floats = RNG.random((2, 6, 6, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", deep)
    np.save(tmp_path / "sub/b.npy", floats)
    found = load(tmp_path)
    assert found.paths == [*(f"a.npy/00000{index}" for index in range(4)), "sub/b.npy/000000", "sub/b.npy/000001"]
    assert (found.sides, found.classes, found.labels.tolist()) == (None, [], [-1] * 6)
    seen = [found.inspect(index, Reading()).measured for index in range(6)]
    reading = Reading(white=depth.settle([one for one in seen if one], "auto"))
    assert reading.white == {"uint16": (0, 4095), "float32": (0, 1)}
    (square,) = found.read(1, reading, image_sizes=[6], channels=1)
    assert np.abs(square[..., 0] - np.rint(deep[1, 1:7] / 4095 * 255)).max() <= 1
    assert np.array_equal(found.read(5, reading, image_sizes=[6], channels=3)[0], np.rint(floats[1] * 255))


def test_image_files_come_before_stacks_and_a_folder_without_any_has_none(tmp_path: Path) -> None:
    assert not find.images(tmp_path).stacks
    np.save(tmp_path / "a.npy", images(3))
    assert find.images(tmp_path).stacks == ["a.npy"]
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    assert not find.images(tmp_path).stacks


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": images(3)}, r"a\.npz: expected an array train_images .*, got images; rename its arrays"),
        ({"train_images": images(3, 28, 28, 28)}, r"got \(3, 28, 28, 28\) of uint8; save its pictures so"),
        ({"train_images": images(3).astype(bool)}, r"got \(3, 28, 28\) of bool"),
        (
            {"train_images": images(3), "train_labels": np.ones((3, 14), int)},
            "expected one label an image, got 14; save",
        ),
        (
            {"train_images": images(3), "train_labels": np.ones(2, int)},
            r"expected 3 whole numbers or names.*got \(2,\)",
        ),
        ({"train_images": images(3), "train_labels": np.array([0.5] * 3)}, "of float64; mend the file"),
        ({"train_images": images(3), "train_labels": np.array([{}] * 3, object)}, "train_labels holds Python objects"),
        ({"train_images": images(0)}, "found none; all are empty"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_unpickled(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        stacks.load(str(tmp_path), find.images(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_archive_with_damaged_pixels_is_skipped_and_one_beyond_memory_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", train_images=images(50))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"found none; a\.npz: a damaged NumPy file"):
        stacks.load(str(tmp_path), find.images(tmp_path))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**13, 28, 28)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("train_images.npy", header.getvalue())
    with pytest.raises(DataError, match=r"^expected a\.npz to fit into memory, it does not; save its images as files"):
        stacks.load(str(tmp_path), find.images(tmp_path))


def test_a_stack_that_does_not_fit_is_skipped_beside_one_that_does_and_two_archives_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_images=images(3))
    np.save(tmp_path / "b.npy", images(3, 4, 4, 4))
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    found = load(tmp_path)
    assert len(found.paths) == 3
    assert [item["path"] for item in found.skipped] == ["b.npy", "c.npz"]
    np.savez(tmp_path / "c.npz", train_images=images(3))
    with pytest.raises(DataError, match=r"expected one \.npz of images in .*, got a\.npz, c\.npz"):
        stacks.load(str(tmp_path), find.images(tmp_path))


def test_an_array_of_one_colour_picture_is_no_stack_of_lines(tmp_path: Path) -> None:
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, images(12, 12, 3))
    with pytest.raises(DataError, match=r"a\.npy: .*, got one picture of \(12, 12, 3\); save it as"):
        load(tmp_path)


def test_folders_of_stacks_are_said_to_be_no_classes(tmp_path: Path) -> None:
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "x.npy", images(3))
    found = load(tmp_path)
    assert (found.classes, len(found.warnings)) == ([], 1)
    assert found.warnings[0].startswith("taken as unlabelled training images: the .npy files in cat, dog; if these are")


def test_names_that_mean_no_label_are_no_classes_of_an_archive_either(tmp_path: Path) -> None:
    names = np.array(["cat", "nan", "dog", "Unlabelled", "", "None"])
    np.savez(tmp_path / "x.npz", train_images=images(6), train_labels=names)
    found = load(tmp_path)
    assert (found.classes, found.labels.tolist()) == (["cat", "dog"], [0, -1, 1, -1, -1, -1])
