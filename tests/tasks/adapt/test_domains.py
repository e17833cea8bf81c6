"""Folders of domains: what becomes of each image, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepclust.adaptation import shifts
from deepclust.datasets.domains import CLEAN
from deepclust.errors import DataError
from deepclust.images.reading import Reading
from tasks.adapt import domains

GREY = {"image_size": 8, "channels": 1, "reading": Reading()}


def put(root: Path, *names: str, size: tuple[int, int] = (8, 8)) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 100, 0)).save(root / name)
    return root


def load(root: Path, **changes: Any) -> list[shifts.Shift]:
    work = root.with_name(f"{root.name}-work")
    work.mkdir(exist_ok=True)
    options: dict[str, Any] = {"classes": ["cat", "dog"], **GREY, "count": 100, "max_pixels": 10**6}
    return domains.load(root, work, **options | {"follow_links": False, "seed": 0} | changes)


def labels(shift: shifts.Shift) -> dict[str, int]:
    return dict(zip(shift.paths, shift.labels.tolist(), strict=True))


def test_class_folders_give_the_numbers_of_classes_and_come_before_images_without_a_label(tmp_path: Path) -> None:
    put(
        tmp_path, "sketch/dog/1.png", "sketch/dog/deep/2.png", "sketch/cat/3.png", "sketch/4.png", "paint/cat/top/5.png"
    )
    put(tmp_path, "loose/6.png", "other/Unlabeled/7.png")
    loose, other, paint, sketch = load(tmp_path, classes=["cat", "cat/top", "dog"])
    assert (paint.name, paint.severity, labels(paint)) == ("paint", 0, {"paint/cat/top/5.png": 1}), "class cat/top"
    assert labels(sketch) == {"sketch/dog/1.png": 2, "sketch/dog/deep/2.png": 2, "sketch/cat/3.png": 0}
    assert loose.labels.tolist() == other.labels.tolist() == [-1]


def test_images_are_brought_to_the_datas_size_and_channels_and_the_choice_is_seeded_and_bounded(tmp_path: Path) -> None:
    """Grey is .299 R + .587 G + .114 B (ITU-R 601-2)."""
    put(tmp_path, *(f"sketch/dog/{number}.png" for number in range(12)), size=(21, 13))
    few, same, other, whole = (load(tmp_path, count=n, seed=seed)[0] for n, seed in ((5, 0), (5, 0), (5, 1), (12, 0)))
    assert (whole.images.shape, whole.images.dtype) == ((12, 8, 8, 1), np.uint8)
    assert np.abs(whole.images - (0.299 * 200 + 0.587 * 100)).max() <= 1
    padded = load(tmp_path, channels=3, reading=Reading(resize="pad"))[0].images
    assert (padded[0, 0] == 0).all()
    assert np.abs(padded[0, 4] - [200.0, 100, 0]).max() <= 1
    assert len(few.images) == len(few.labels) == 5
    assert few.paths == same.paths == whole.paths[:5] != other.paths
    assert isinstance(whole.images, np.memmap)


def test_unreadable_files_and_links_out_of_the_folder_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "domains", "sketch/dog/1.png")
    (root / "sketch/dog/2.png").write_bytes(b"no image")
    (root / "linked").symlink_to(put(tmp_path / "secret", "1.png"))
    (root / "README.md").write_text("Put images here.")
    (found,) = load(root)
    assert found.paths == ["sketch/dog/1.png"]
    output = capsys.readouterr().out
    assert "skipped sketch/dog/2.png: not an image that can be read" in output
    assert "skipped linked: a link that leaves the folder" in output
    (root / "sketch/dog/1.png").unlink()
    with pytest.raises(DataError, match="could read none of 1; mend or remove it"):
        load(root)


def test_what_can_not_be_told_is_refused(tmp_path: Path) -> None:
    cases = (
        ("1.png", "expected folders domain/class/images .* got the image 1.png beside them; move it"),
        ("clean/dog/1.png", "expected other names of domains .* than 'clean', .*; rename it"),
    )
    for case, (name, message) in enumerate(cases):
        with pytest.raises(DataError, match=message):
            load(put(tmp_path / str(case), "paint/dog/1.png", name))


def test_folders_that_are_no_class_of_the_training_data_are_unlabelled_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "sketch/Cat /1.png", "sketch/dogs/2.png", "sketch/dogs/3.png", "sketch/xyz/4.png", "all/other/5.png")
    other, sketch = load(tmp_path)
    assert (labels(sketch), labels(other)) == ({"sketch/Cat /1.png": 0}, {"all/other/5.png": -1})
    assert shifts.CLEAN[0] == CLEAN
    first, second = capsys.readouterr().out.splitlines()
    said = "has folders that are no classes of the training data, so their images are unlabelled:"
    assert first == f"warning: the domain all {said} other (1); rename those that are classes"
    assert second == f"warning: the domain sketch {said} dogs (2; is it dog?), xyz (1); rename those that are classes"


def test_where_the_data_have_no_classes_a_domains_own_folders_are_numbered_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "sketch/dog/1.png", "sketch/dog/deep/2.png", "sketch/bird/3.png", "paint/dog/4.png", "loose/5.png")
    loose, paint, sketch = load(tmp_path, classes=[])
    assert labels(sketch) == {"sketch/dog/1.png": 1, "sketch/dog/deep/2.png": 1, "sketch/bird/3.png": 0}
    assert (labels(paint), labels(loose)) == ({"paint/dog/4.png": 0}, {"loose/5.png": -1})
    said = [line.split(", so")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"{name}: the training data have no classes" for name in ("paint", "sketch")]


def test_what_links_lead_to_is_a_domain_if_asked_for_and_a_stack_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "domains", "sketch/dog/1.png")
    (root / "paint").symlink_to(put(tmp_path / "elsewhere", "cat/2.png"))
    np.save(root / "stack.npy", np.zeros((3, 8, 8), np.uint8))
    assert [shift.name for shift in load(root)] == ["sketch"]
    assert [labels(shift) for shift in load(root, follow_links=True)] == [
        {"paint/cat/2.png": 0},
        {"sketch/dog/1.png": 1},
    ]
    said = capsys.readouterr().out
    assert "skipped paint: a link that leaves the folder; data.follow_links: true would take it" in said
    assert "warning: DVC does not notice what changes behind links to folders (paint)" in said
    assert "skipped stack.npy: NumPy stack" in said
