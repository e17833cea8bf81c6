"""What a folder's shape says of splits and labels."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def load(root: Path, seed: int = 0, test_fraction: float = 0.2) -> folders.Folder:
    return folders.load(str(root), test_fraction=test_fraction, seed=seed, max_pixels=1000)


def labelled(folder: folders.Folder, split: str) -> dict[str, str | None]:
    names = [*folder.classes, None]
    return {path: names[label] for path, label in zip(folder.paths[split], folder.labels[split], strict=True)}


def test_train_and_test_folders_are_the_splits_and_their_folders_the_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/deep/1.png", "train/cat/2.jpg", "train/dog/1.PNG", "val/dog/1.png", "val/cat/1.png")
    found = load(tmp_path)
    assert found.classes == ["cat", "dog"]
    assert labelled(found, "train") == {
        "train/cat/2.jpg": "cat",
        "train/cat/deep/1.png": "cat",
        "train/dog/1.PNG": "dog",
    }
    assert labelled(found, "test") == {"val/cat/1.png": "cat", "val/dog/1.png": "dog"}
    assert found.warnings == []


def test_unlabelled_beside_train_and_test_belongs_to_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png", "unlabelled/x/1.png")
    assert labelled(load(tmp_path), "train")["unlabelled/x/1.png"] is None


def test_a_second_test_folder_is_left_out_with_a_warning(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png", "val/a/1.png")
    found = load(tmp_path)
    assert sum(len(paths) for paths in found.paths.values()) == 4
    assert found.warnings == ["not used beside train/ and test/: val"]


def test_train_is_a_class_where_there_is_no_test_folder(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("train/{}.png", 5), *numbered("car/{}.png", 5))
    assert load(tmp_path).classes == ["car", "train"]


def test_a_lone_train_folder_is_split_by_the_seed(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("train/a/{}.png", 10), *numbered("train/b/{}.png", 10))
    found = load(tmp_path)
    assert found.classes == ["a", "b"]
    assert len(found.paths["test"]) == 4


def test_one_tree_is_split_per_class_and_by_the_seed_alone(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/{}.png", 50), *numbered("b/{}.png", 10), *numbered("unlabelled/{}.png", 20))
    found, again, other = load(tmp_path), load(tmp_path), load(tmp_path, seed=1)
    assert np.bincount(found.labels["test"] + 1).tolist() == [4, 10, 2]
    assert np.bincount(found.labels["train"] + 1).tolist() == [16, 40, 8]
    assert found.paths == again.paths
    assert found.paths != other.paths
    assert not set(found.paths["train"]) & set(found.paths["test"])
    assert found.paths["test"] == sorted(found.paths["test"])


@pytest.mark.parametrize("word", ["unlabelled", "unlabeled", "Unlabelled"])
def test_unlabelled_beside_class_folders_is_no_class(tmp_path: Path, word: str) -> None:
    touch(tmp_path, *numbered("a/{}.png", 2), *numbered("b/{}.png", 2), *numbered(f"{word}/sub/{{}}.png", 3))
    found = load(tmp_path)
    assert found.classes == ["a", "b"]
    assert sum((labels < 0).sum() for labels in found.labels.values()) == 3


@pytest.mark.parametrize("names", [numbered("{}.png", 5), numbered("images/{}.png", 5), numbered("a/b/{}/x.png", 5)])
def test_loose_images_or_one_folder_are_unlabelled(tmp_path: Path, names: list[str]) -> None:
    found = load(touch(tmp_path, *names))
    assert found.classes == []
    assert (np.concatenate(list(found.labels.values())) == -1).all()
    assert len(found.warnings) == ("/" in names[0])


def test_loose_images_beside_folders_are_unlabelled_with_a_warning(tmp_path: Path) -> None:
    found = load(touch(tmp_path, "0.png", "2021/1.png", "2022/deep/2.png"))
    assert found.classes == []
    assert "1 images lie beside 2 folders" in found.warnings[0]


def test_a_test_folder_that_wraps_its_images_in_one_folder_is_unlabelled(tmp_path: Path) -> None:
    found = load(touch(tmp_path, "train/a/1.png", "train/b/1.png", "val/images/1.png", "val/images/2.png"))
    assert found.classes == ["a", "b"]
    assert found.labels["test"].tolist() == [-1, -1]
    assert "images" in found.warnings[0]


def test_a_test_folder_of_one_known_class_stays_labelled(tmp_path: Path) -> None:
    found = load(touch(tmp_path, "train/a/1.png", "train/b/1.png", "val/b/1.png"))
    assert found.labels["test"].tolist() == [1]


def test_classes_that_are_never_trained_on_are_named(tmp_path: Path) -> None:
    found = load(touch(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/1.png", "test/new/1.png"))
    assert found.warnings == ["classes without a training image: new"]


def test_one_folder_that_wraps_the_splits_is_looked_into(tmp_path: Path) -> None:
    found = load(touch(tmp_path, "set/train/a/1.png", "set/train/b/1.png", "set/test/a/1.png", "set/test/b/1.png"))
    assert found.classes == ["a", "b"]
    assert found.paths["test"] == ["set/test/a/1.png", "set/test/b/1.png"]


def write_labels(root: Path, text: str) -> None:
    (root / "labels.csv").write_text(text, encoding="utf-8")


def test_labels_csv_decides_and_what_it_leaves_open_is_unlabelled(tmp_path: Path) -> None:
    touch(tmp_path, "x/1.png", "x/2.png", "y/ü, 3.png", "y/4.png", "5.png")
    write_labels(tmp_path, 'label,path,note\ncat,x/1.png,\n dog ,./x/2.png,\ncat,"y/ü, 3.png",\n,y/4.png,\n')
    found = load(tmp_path)
    assert labelled(found, "train") | labelled(found, "test") == {
        "x/1.png": "cat",
        "x/2.png": "dog",
        "y/ü, 3.png": "cat",
        "y/4.png": None,
        "5.png": None,
    }


def test_labels_csv_with_no_line_takes_a_tree_as_unlabelled(tmp_path: Path) -> None:
    touch(tmp_path, "2021/1.png", "2022/1.png")
    write_labels(tmp_path, "path,label\n")
    assert load(tmp_path).classes == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\n", "expected the columns path and label in its first line, found no label"),
        ("", "found no label and no path"),
        ("path,label\n1.png,a\nnone.png,a\n", "line 3: expected an image of the folder, found no 'none.png'"),
        ("path,label\n../1.png,a\n", "line 2: expected a path inside the folder"),
        ("path,label\n/etc/1.png,a\n", "line 2: expected a path inside the folder"),
        ("path,label\n1.png,a\n./1.png,b\n", "line 3: expected each image once"),
        ("path,label\n1.png\n", "line 2: expected a path and a label"),
        ("path,label\n.hidden.png,a\n", "found no '.hidden.png'"),
    ],
)
def test_labels_csv_that_does_not_fit_is_one_line_of_error(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "1.png", ".hidden.png")
    write_labels(tmp_path, text)
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_csv_that_is_no_text_is_one_line_of_error(tmp_path: Path) -> None:
    touch(tmp_path, "1.png")
    (tmp_path / "labels.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(DataError, match="UTF-8"):
        load(tmp_path)


def test_a_missing_or_empty_folder_is_one_line_of_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing"):
        load(tmp_path / "none")
    touch(tmp_path, "a.txt", ".hidden.png")
    with pytest.raises(DataError, match="found a file"):
        load(tmp_path / "a.txt")
    with pytest.raises(DataError, match="found none among 1 files"):
        load(tmp_path)


def test_hidden_files_are_not_seen_and_others_counted(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", ".2.png", ".git/3.png", "notes.txt", "sub/Thumbs.db", "sub/4.webp")
    files = find.images(tmp_path)
    assert files == find.Files(images=["1.png", "sub/4.webp"], skipped=[], ignored=2)


def test_nothing_outside_of_the_folder_is_ever_listed(tmp_path: Path) -> None:
    touch(tmp_path, "out/secret.png", "data/real.png", "data/sub/other.png")
    data = tmp_path / "data"
    (data / "file.png").symlink_to(tmp_path / "out" / "secret.png")
    (data / "folder").symlink_to(tmp_path / "out")
    (data / "up").symlink_to(data)
    (data / "gone.png").symlink_to(data / "none.png")
    (data / "circle.png").symlink_to(data / "circle.png")
    (data / "inside.png").symlink_to(data / "real.png")
    files = find.images(data)
    assert files.images == ["inside.png", "real.png", "sub/other.png"]
    assert {item["path"]: item["reason"] for item in files.skipped} == {
        "circle.png": "a broken link",
        "file.png": "a link that leaves the folder",
        "folder": "a link that leaves the folder",
        "gone.png": "a broken link",
        "up": "a link to a folder",
    }


def test_a_link_as_the_folder_itself_is_followed(tmp_path: Path) -> None:
    touch(tmp_path, "real/1.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert find.images(tmp_path / "link").images == ["1.png"]


def test_a_name_that_is_not_utf8_is_skipped_and_can_be_written_down(tmp_path: Path) -> None:
    touch(tmp_path, "1.png")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system refuses such names")
    files = find.images(tmp_path)
    assert files.images == ["1.png"]
    assert files.skipped == [{"path": "\\udcff.png", "reason": "its name is not UTF-8"}]


def test_the_name_of_a_source_holds_no_machines_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "pictures/1.png", "pictures/2.png")
    assert load(tmp_path / "pictures").name == "pictures"
    monkeypatch.chdir(tmp_path)
    assert load(Path("./pictures/")).name == "pictures"


@pytest.mark.parametrize(("sides", "expected"), [((9, 20, 31), 20), ((4, 4, 4), 8), ((100, 200, 300), 64)])
def test_the_automatic_size_is_the_median_shorter_side_within_bounds(
    tmp_path: Path, sides: tuple[int, ...], expected: int
) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    for index, side in enumerate(sides):
        Image.new("L", (side, 2 * side)).save(tmp_path / f"train/a/{index}.png")
    touch(tmp_path, "train/a/broken.png", "test/a/1.png")
    assert folders.load(str(tmp_path), test_fraction=0.2, seed=0, max_pixels=10**6).own_size() == expected
