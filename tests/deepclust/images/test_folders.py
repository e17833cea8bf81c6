"""What a folder's shape says of splits and labels."""

from __future__ import annotations

import re
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
    return folders.load(str(root), max_pixels=1000)


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


def test_labels_csv_decides_and_what_it_leaves_open_is_unlabelled(tmp_path: Path) -> None:
    touch(tmp_path, "x/1.png", "x/2.png", "y/ü, 3.png", "y/4.png", "5.png")
    text = 'label,path,note\ncat,x/1.png,\n dog ,./x/2.png,\ncat,"y/ü, 3.png",\n,y/4.png,\n'
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    found = load(tmp_path)
    expected = {"x/1.png": "cat", "x/2.png": "dog", "y/ü, 3.png": "cat", "y/4.png": None, "5.png": None}
    assert labelled(found) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\n", "expected the columns path and label in its first line, found no label"),
        ("path,label\n1.png,a\nnone.png,a\n", "line 3: expected an image of the folder, found no 'none.png'"),
        ("path,label\n../1.png,a\n", "line 2: expected a path inside the folder"),
        ("path,label\n1.png,a\n./1.png,b\n", "line 3: expected each image once"),
        ("path,label\n1.png\n", "line 2: expected a path and a label"),
        (b"path,label\n\xff\xfe,a\n", "expected a CSV file in UTF-8"),
    ],
)
def test_labels_csv_that_does_not_fit_is_one_line_of_error(tmp_path: Path, text: str | bytes, message: str) -> None:
    touch(tmp_path, "1.png")
    (tmp_path / "labels.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$"):
        load(tmp_path)


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
        "file.png": "a link that leaves the folder",
        "folder": "a link that leaves the folder",
        "gone.png": "a broken link",
        "up": "a link to a folder",
        **{ascii(name)[1:-1]: "its name is not UTF-8" for name in not_utf8},
    }
