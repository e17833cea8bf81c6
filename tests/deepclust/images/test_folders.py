"""What a folder's shape says of splits and labels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from deepclust.errors import DataError
from deepclust.images import find, folders


def touch(root: Path, *names: str) -> Path:
    """Images are only listed here, never opened."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def numbered(pattern: str, count: int) -> list[str]:
    return [pattern.format(index) for index in range(count)]


def load(root: Path) -> folders.Folder:
    return folders.load(str(root), find.images(root), max_pixels=1000)


def labelled(folder: folders.Folder, side: str | None = None) -> dict[str, str | None]:
    """The class of each image, or of each image of a side."""
    names = [*folder.classes, None]
    found = zip(folder.paths, folder.labels, folder.sides or [None] * len(folder.paths), strict=True)
    return {path: names[label] for path, label, own in found if own == side}


def test_train_and_test_folders_are_the_splits_and_their_folders_the_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/deep/1.png", "train/dog/1.PNG", "val/dog/1.png", "val/cat/1.png", "unlabelled/x/1.png")
    found = load(tmp_path)
    train = {"train/cat/deep/1.png": "cat", "train/dog/1.PNG": "dog", "unlabelled/x/1.png": None}
    assert (found.classes, found.warnings) == (["cat", "dog"], [])
    assert labelled(found, "train") == train
    assert labelled(found, "test") == {"val/cat/1.png": "cat", "val/dog/1.png": "dog"}


WHOLE = ["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"]


@pytest.mark.parametrize(
    ("names", "classes", "labels", "warning"),
    [
        ([*WHOLE, "val/a/1.png"], ["a", "b"], [0, 1], "not used beside train/ and test/: val"),
        ([*WHOLE[:2], "val/b/1.png"], ["a", "b"], [1], None),
        ([*WHOLE[:2], "val/x/1.png", "val/x/2.png"], ["a", "b"], [-1, -1], "all labelled test images are of one"),
        ([*WHOLE, "test/new/1.png"], ["a", "b", "new"], [0, 1, 2], None),
        ([*numbered("train/{}.png", 5), *numbered("car/{}.png", 5)], ["car", "train"], [0] * 5 + [1] * 5, None),
        ([*numbered("train/a/{}.png", 2), *numbered("train/b/{}.png", 2)], ["a", "b"], [0, 0, 1, 1], None),
        (
            [*numbered("a/{}.png", 2), "b/2.png", *numbered("Unlabeled/x/{}.png", 2)],
            ["a", "b"],
            [-1, -1, 0, 0, 1],
            None,
        ),
        (numbered("{}.png", 2), [], [-1, -1], None),
        (numbered("images/{}.png", 2), [], [-1, -1], "of one class, images"),
        (["0.png", "2021/1.png", "2022/deep/2.png"], [], [-1] * 3, "1 images lie beside 2 folders"),
    ],
)
def test_a_folders_shape_decides_on_classes_and_splits_and_what_is_odd_is_said(
    tmp_path: Path, names: list[str], classes: list[str], labels: list[int], warning: str | None
) -> None:
    """The labels are those of the test images, or of all where the folder states no sides."""
    found = load(touch(tmp_path, *names))
    tested = np.array([side != "train" for side in found.sides or ["drawn"] * len(found.paths)])
    assert (found.classes, found.labels[tested].tolist()) == (classes, labels)
    assert len(found.warnings) == (warning is not None)
    assert not warning or warning in found.warnings[0]


SPLITS = [
    ("training_set", "test_set"),
    ("training", "testing"),
    ("train2017", "val2017"),
    ("seg_train", "seg_test"),
    ("Flowers Train", "Flowers Test"),
    ("trainset", "testset"),
    ("trainingImages", "validationImages"),
    ("imgs-trn", "imgs-tst"),
    ("train", "dev"),
]


@pytest.mark.parametrize(("train", "test"), SPLITS)
@pytest.mark.parametrize("wrapping", ["", "archive/", "data/raw/"])
def test_usual_names_of_split_folders_are_sides_also_below_folders_that_wrap_them(
    tmp_path: Path, train: str, test: str, wrapping: str
) -> None:
    names = [f"{wrapping}{side}/{kind}/1.png" for side in (train, test) for kind in ("cat", "dog")]
    found = load(touch(tmp_path, *names))
    assert (found.classes, found.sides, found.warnings) == (["cat", "dog"], ["train"] * 2 + ["test"] * 2, [])
    assert labelled(found, "test") == {names[2]: "cat", names[3]: "dog"}


@pytest.mark.parametrize(
    "heads", [("train", "bus", "car"), ("training shoes", "test tubes"), ("train", "test tubes"), ("val", "test")]
)
def test_classes_whose_names_only_resemble_sides_are_classes(tmp_path: Path, heads: tuple[str, ...]) -> None:
    found = load(touch(tmp_path, *(f"{head}/1.png" for head in heads)))
    assert (found.classes, found.sides, found.warnings) == (sorted(heads), None, [])


def test_the_test_folder_is_test_before_val_unless_it_has_no_classes_and_others_are_not_used(tmp_path: Path) -> None:
    tree = [f"x_{side}/{kind}/1.png" for side in ("train", "test", "val") for kind in ("a", "b")]
    found = load(touch(tmp_path / "labelled", *tree, "x_pred/9.png"))
    assert set(labelled(found, "test")) == {"x_test/a/1.png", "x_test/b/1.png"}
    assert found.warnings == [
        "not used beside x_train/ and x_test/: x_pred, x_val; move what is to be used into one of them, or into "
        "unlabelled/"
    ]
    found = load(touch(tmp_path / "unlabelled", *tree[:2], *tree[4:], "x_test/1.png"))
    assert set(labelled(found, "test")) == {"x_val/a/1.png", "x_val/b/1.png"}


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["flowers/rose/1.png", "flowers/lily/2.png"], ["lily", "rose"]),
        (["data/raw/rose/1.png", "data/raw/lily/2.png"], ["lily", "rose"]),
        (["seg_train/seg_train/a/1.png", "seg_train/seg_train/b/2.png", "seg_test/seg_test/a/3.png"], ["a", "b"]),
        (["train/images/a/1.png", "train/images/b/2.png", "test/images/b/3.png"], ["a", "b"]),
        (["train/train/a/1.png", "train/train/b/2.png", "test/a/3.png"], ["a", "b"]),
        (["train/train/a/1.png", "train/train/b/2.png", "test/test/3.png"], ["a", "b"]),
        (["train/a/x/1.png", "train/b/2.png", "test/a/x/3.png"], ["a", "b"]),
        (["flowers/a/1.png", "flowers/b/2.png", "unlabelled/3.png"], ["a", "b"]),
        (["n01/images/1.png", "n02/images/2.png"], ["n01", "n02"]),
        (["images/1.png", "images/2.png"], []),
        (["data/images/1.png", "data/images/2.png"], []),
    ],
)
def test_folders_that_wrap_a_data_set_or_a_side_are_no_classes(
    tmp_path: Path, names: list[str], labels: list[str]
) -> None:
    assert load(touch(tmp_path, *names)).classes == labels


@pytest.mark.parametrize(
    ("names", "warning"),
    [
        (["part1/a/1.png", "part2/b/2.png"], "the 2 classes look like parts of a data set: part1, part2; if they are"),
        (["fold_0/1.png", "fold_1/2.png"], "the 2 classes look like parts of a data set: fold_0, fold_1; if"),
        (
            [f"{side}{kind}/1.png" for side in ("train", "test") for kind in "AB"],
            "look like parts of a data set: testA",
        ),
        (
            [f"{kind}/{side}/1.png" for kind in ("cat", "dog") for side in ("train", "test")],
            "(cat, dog) have sub-folders that look like splits: test, train; move them above the class folders",
        ),
        (
            ["images/train/1.png", "images/val/2.png", "masks/train/1.png"],
            "(images, masks) have sub-folders that look like splits: train, val; move them above",
        ),
        (
            [f"{camera}/{kind}/1.png" for camera in ("left", "right") for kind in ("cat", "dog")],
            "all 2 classes (left, right) have the same sub-folders, which might be the classes: cat, dog; if they are",
        ),
        (
            ["Cat/1.png", "cat/2.png", "cat/3.png", "dog/4.png"],
            "class folders that are taken as one class: 'cat' = 'Cat'",
        ),
        (["train/hot dog/1.png", "train/b/1.png", "test/Hot  dog/2.png", "test/b/1.png"], "'hot dog' = 'Hot  dog'"),
        (
            ["a/1.png", "b/1.png", "a/labels.csv"],
            "not used in a sub-folder: a/labels.csv; put all labels into one table",
        ),
    ],
)
def test_classes_that_look_like_something_else_are_said(tmp_path: Path, names: list[str], warning: str) -> None:
    (found,) = load(touch(tmp_path, *names)).warnings
    assert warning in found


def test_a_missing_or_empty_folder_is_one_line_of_error(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", ".hidden.png")
    for path, message in [("none", "found nothing"), ("a.txt", "found a file"), (".", "found none among 1 files")]:
        with pytest.raises(DataError, match=message):
            load(tmp_path / path)


def test_nothing_outside_of_the_folder_is_ever_listed_and_hidden_files_are_not_seen(tmp_path: Path) -> None:
    data = touch(tmp_path, "out/secret.png") / "data"
    touch(data, "real.png", "sub/other.webp", ".2.png", ".git/3.png", "notes.txt", "sub/Thumbs.db")
    not_utf8 = ["\udcff.png"] if sys.platform == "linux" else []  # other systems refuse such a name
    touch(data, *not_utf8)
    (data / "file.png").symlink_to(tmp_path / "out" / "secret.png")
    (data / "folder").symlink_to(tmp_path / "out")
    (data / "up").symlink_to(data)
    (data / "gone.png").symlink_to(data / "none.png")
    (data / "circle.png").symlink_to(data / "circle.png")
    (data / "inside.png").symlink_to(data / "real.png")
    (tmp_path / "link").symlink_to(data)
    files = find.images(tmp_path / "link")  # a link as the folder itself is followed
    assert files.images == ["inside.png", "real.png", "sub/other.webp"]
    assert files.ignored == 2
    assert {item["path"]: item["reason"] for item in files.skipped} == {
        "circle.png": "a broken link",
        "file.png": "a link that leaves the folder; data.follow_links: true would take it",
        "folder": "a link that leaves the folder; data.follow_links: true would take it",
        "gone.png": "a broken link",
        "up": "a link to a folder",
        **{ascii(name)[1:-1]: "its name is not UTF-8" for name in not_utf8},
    }


def test_a_table_of_labels_is_no_ignored_file_and_with_its_first_line_alone_nothing_is_labelled(tmp_path: Path) -> None:
    touch(tmp_path, "patient1/1.png", "patient2/1.png", "notes.txt")
    (tmp_path / "labels.csv").write_text("path,label\n")
    found = load(tmp_path)
    assert (found.classes, labelled(found)) == ([], {"patient1/1.png": None, "patient2/1.png": None})
    assert found.ignored == 1
