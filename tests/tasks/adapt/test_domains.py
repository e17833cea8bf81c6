"""Folders of domains: what becomes of each image, and what is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepclust.adaptation import shifts
from deepclust.errors import DataError
from tasks.adapt import domains

CLASSES = ["cat", "dog"]
GREY = {"image_size": 8, "channels": 1, "resize": "crop"}


def put(path: Path, colour: tuple[int, int, int] = (200, 100, 0), size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def load(root: Path, **changes: Any) -> list[shifts.Shift]:
    options: dict[str, Any] = {
        "classes": CLASSES,
        "statistics": GREY,
        "count": 100,
        "max_pixels": 10**6,
        "seed": 0,
    } | changes
    return domains.load(root, Path(tempfile.mkdtemp(dir=root.parent)), **options)


def labels_by_path(shift: shifts.Shift) -> dict[str, int]:
    return dict(zip(shift.paths, shift.labels.tolist(), strict=True))


def test_class_folders_give_the_numbers_of_the_datas_classes(tmp_path: Path) -> None:
    for name in ("sketch/dog/1.png", "sketch/dog/deep/2.png", "sketch/cat/3.png", "paint/dog/4.png"):
        put(tmp_path / name)
    paint, sketch = load(tmp_path)
    assert (paint.name, paint.severity, sketch.name) == ("paint", 0, "sketch")
    assert labels_by_path(paint) == {"paint/dog/4.png": 1}
    assert labels_by_path(sketch) == {"sketch/dog/1.png": 1, "sketch/dog/deep/2.png": 1, "sketch/cat/3.png": 0}


def test_a_class_with_a_slash_is_a_folder_in_a_folder(tmp_path: Path) -> None:
    for name in ("sketch/shirt/top/1.png", "sketch/shirt/2.png"):
        put(tmp_path / name)
    (sketch,) = load(tmp_path, classes=["shirt", "shirt/top"])
    assert labels_by_path(sketch) == {"sketch/shirt/top/1.png": 1, "sketch/shirt/2.png": 0}
    (tmp_path / "sketch/shirt/2.png").unlink()
    assert labels_by_path(load(tmp_path, classes=["shirt/top"])[0]) == {"sketch/shirt/top/1.png": 0}


@pytest.mark.parametrize("folder", ["loose", "other/unlabelled", "other/Unlabeled"])
def test_loose_images_and_those_of_unlabelled_have_no_label(tmp_path: Path, folder: str) -> None:
    put(tmp_path / folder / "1.png")
    put(tmp_path / folder / "2.png")
    (found,) = load(tmp_path)
    assert found.labels.tolist() == [-1, -1]
    (without,) = load(tmp_path, classes=[])
    assert without.labels.tolist() == [-1, -1]


def test_labelled_images_are_taken_before_others(tmp_path: Path) -> None:
    for name in ("sketch/dog/1.png", "sketch/2.png", "sketch/unlabelled/3.png"):
        put(tmp_path / name)
    assert labels_by_path(load(tmp_path)[0]) == {"sketch/dog/1.png": 1}


@pytest.mark.parametrize(("channels", "pixel"), [(1, [0.299 * 200 + 0.587 * 100]), (3, [200, 100, 0])])
def test_images_are_brought_to_the_datas_size_and_channels(tmp_path: Path, channels: int, pixel: list[float]) -> None:
    """Grey is .299 R + .587 G + .114 B (ITU-R 601-2)."""
    put(tmp_path / "sketch/dog/1.png", size=(21, 13))
    (found,) = load(tmp_path, statistics=GREY | {"channels": channels})
    assert found.images.shape == (1, 8, 8, channels)
    assert found.images.dtype == np.uint8
    assert np.abs(found.images - pixel).max() <= 1


def test_resizing_is_the_datas(tmp_path: Path) -> None:
    put(tmp_path / "sketch/dog/1.png", size=(16, 8))
    padded, cropped = (load(tmp_path, statistics=GREY | {"resize": how})[0].images for how in ("pad", "crop"))
    assert (padded[0, :2] == 0).all()
    assert (cropped > 0).all()


def test_the_choice_is_seeded_and_bounded_and_more_images_go_on(tmp_path: Path) -> None:
    for number in range(12):
        put(tmp_path / f"sketch/dog/{number:02}.png", colour=(number * 20,) * 3)
    whole, few, same, other = (
        load(tmp_path, count=count, seed=seed)[0] for count, seed in ((12, 0), (5, 0), (5, 0), (5, 1))
    )
    assert len(few.paths) == len(few.images) == len(few.labels) == 5
    assert few.paths == same.paths == whole.paths[:5]
    assert few.paths != other.paths
    for path, image in zip(whole.paths, whole.images, strict=True):
        assert (image == 20 * int(Path(path).stem)).all()


def test_unreadable_files_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "sketch/dog/1.png")
    (tmp_path / "sketch/dog/2.png").write_bytes(b"no image")
    (found,) = load(tmp_path)
    assert labels_by_path(found) == {"sketch/dog/1.png": 1}
    assert "skipped sketch/dog/2.png: not an image that can be read" in capsys.readouterr().out


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "domains"
    outside = put(tmp_path / "secret/1.png")
    put(root / "sketch/dog/1.png")
    (root / "sketch/dog/2.png").symlink_to(outside)
    (root / "linked").symlink_to(outside.parent)
    (found,) = load(root)
    assert found.paths == ["sketch/dog/1.png"]
    output = capsys.readouterr().out
    assert "skipped linked: a link that leaves the folder" in output
    assert "skipped sketch/dog/2.png: a link that leaves the folder" in output


def test_a_folder_without_images_has_no_domains(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Put images here.")
    (tmp_path / "empty").mkdir()
    assert load(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1.png", "expected folders domain/class/images .* got the image 1.png beside them; move it"),
        ("sketch/bird/1.png", r"classes of the training data \(cat, dog\), got 'bird' in sketch; rename it, or call"),
        ("clean/dog/1.png", "expected other names of domains .* than 'clean', .*; rename it"),
    ],
)
def test_what_can_not_be_told_is_refused_in_one_line(tmp_path: Path, name: str, message: str) -> None:
    put(tmp_path / "paint/dog/1.png")
    put(tmp_path / name)
    with pytest.raises(DataError, match=message) as refused:
        load(tmp_path)
    assert "\n" not in str(refused.value)


def test_where_the_data_have_no_classes_a_domains_own_folders_are_numbered_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sketch/dog/1.png", "sketch/dog/deep/2.png", "sketch/bird/3.png", "paint/dog/4.png", "loose/5.png"):
        put(tmp_path / name)
    loose, paint, sketch = load(tmp_path, classes=[])
    assert labels_by_path(sketch) == {"sketch/dog/1.png": 1, "sketch/dog/deep/2.png": 1, "sketch/bird/3.png": 0}
    assert labels_by_path(paint) == {"paint/dog/4.png": 0}
    assert labels_by_path(loose) == {"loose/5.png": -1}
    said = capsys.readouterr().out.splitlines()
    assert [line.split(", so")[0] for line in said] == [
        "paint: the training data have no classes",
        "sketch: the training data have no classes",
    ]


def test_images_are_mapped_from_a_file_of_their_own(tmp_path: Path) -> None:
    root, work = tmp_path / "domains", tmp_path / "work"
    work.mkdir()
    for number in range(3):
        put(root / f"sketch/dog/{number}.png", colour=(number * 20,) * 3)
    options: dict[str, Any] = {"classes": CLASSES, "statistics": GREY, "count": 9, "max_pixels": 10**6, "seed": 0}
    (found,) = domains.load(root, work, **options)
    assert isinstance(found.images, np.memmap)
    assert (work / "sketch").read_bytes() == found.images.tobytes()
    assert found.images[:, 0, 0, 0].tolist() == [20 * int(Path(path).stem) for path in found.paths]


def test_a_domain_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sketch/dog").mkdir(parents=True)
    (tmp_path / "sketch/dog/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="could read none of 1; mend or remove it"):
        load(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a folder of images at .*nowhere, found nothing"):
        load(tmp_path / "nowhere")
