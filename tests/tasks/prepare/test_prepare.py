"""The stage prepare: what it writes, for a folder of images."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks.prepare import __main__ as prepare
from tasks.prepare import arrays
from tasks.shared.operations import params
from tests.paths import ROOT

PARAMS = ROOT / "params.yaml"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the stage sets them; this puts them back
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *, seed: int = 0, **data: Any) -> dict[str, Any]:
    """Run the stage with these parameters of `data` in the current folder; its meta.json."""
    values = params.read(PARAMS)
    values["seed"] = seed
    values["data"] |= {"source": "folder", "folder": "data"} | data
    Path("params.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    monkeypatch.setattr("sys.argv", ["prepare"])
    prepare.main()
    meta: dict[str, Any] = json.loads(Path("artifacts/prepare/meta.json").read_text(encoding="utf-8"))
    return meta


def picture(path: str, colour: int | tuple[int, ...] = 100, side: int = 8) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", (side, side), colour).save(path)


def classes(count: int = 10, side: int = 8) -> None:
    """Two classes of so many grey images, each image of a brightness of its own."""
    for index in range(count):
        picture(f"data/dark/{index:02d}.png", index, side)
        picture(f"data/light/{index:02d}.png", 255 - index, side)


def array(split: str, name: str) -> np.ndarray:
    loaded: np.ndarray = np.load(f"artifacts/prepare/{split}/{name}.npy", allow_pickle=False)
    return loaded


def items(split: str) -> list[dict[str, str]]:
    with Path(f"artifacts/prepare/{split}/items.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def digest() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path("artifacts").rglob("*")) if path.is_file()}


def test_images_labels_and_items_are_in_one_order(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes()
    meta = run(monkeypatch)
    assert meta["classes"] == ["dark", "light"]
    for split, count in (("train", 16), ("test", 4)):
        images, labels, rows = array(split, "images"), array(split, "labels"), items(split)
        assert images.shape == (count, 8, 8, 1)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        for row, image, label in zip(rows, images, labels, strict=True):
            kind, number = row["path"].removesuffix(".png").split("/")
            assert row["label"] == kind == meta["classes"][label]
            assert (image == (int(number) if kind == "dark" else 255 - int(number))).all()
        assert [int(row["index"]) for row in rows] == list(range(count))
        assert meta[split] == {"images": count, "labelled": count}


def test_statistics_are_those_of_the_training_images(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, colour in enumerate([(10, 0, 90), (250, 0, 7), (30, 0, 200), (77, 0, 13)]):
        picture(f"data/train/{index}.png", colour)
    picture("data/test/0.png", (255, 255, 255))
    run(monkeypatch)
    statistics = json.loads(Path("artifacts/prepare/statistics.json").read_text())
    values = array("train", "images").reshape(-1, 3) / 255
    assert statistics["mean"] == pytest.approx(values.mean(0).tolist(), abs=1e-6)
    assert statistics["std"][::2] == pytest.approx(values.std(0)[::2].tolist(), abs=1e-6)
    assert statistics["std"][1] == pytest.approx(1 / 255, abs=1e-6), "a constant channel is divided by this"
    assert (statistics["image_size"], statistics["channels"], statistics["resize"]) == (8, 3, "crop")


@pytest.mark.parametrize(("colours", "channels"), [([90, (5, 5, 5)], 1), ([90, (5, 5, 6)], 3)])
def test_automatic_colour_is_rgb_as_soon_as_one_image_has_colour(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, colours: list[Any], channels: int
) -> None:
    picture("data/train/1.png", 90)
    picture("data/test/1.png", colours[0])
    picture("data/test/2.png", colours[1])
    assert run(monkeypatch)["channels"] == channels
    assert array("train", "images").shape == (1, 8, 8, channels)
    assert (array("test", "images")[1, 0, 0] == np.array(colours[1])[:channels]).all()


@pytest.mark.parametrize(("colour", "channels"), [("grey", 1), ("rgb", 3)])
def test_a_stated_colour_is_kept_to(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, colour: str, channels: int
) -> None:
    picture("data/train/1.png", (200, 100, 50))
    picture("data/test/1.png", 7)
    assert run(monkeypatch, colour=colour, image_size=16)["channels"] == channels
    assert array("test", "images").shape == (1, 16, 16, channels)


def test_held_out_images_are_a_labelled_share_of_each_class(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(30):
        picture(f"data/train/a/{index}.png")
        picture(f"data/train/unlabelled/{index}.png")
    for index in range(4):
        picture(f"data/train/b/{index}.png")
    picture("data/train/single/0.png")
    picture("data/test/a/0.png")
    picture("data/test/b/0.png")
    meta = run(monkeypatch)
    heldout = array("train", "heldout")
    labels = array("train", "labels")
    assert meta["train"] == {"images": 65, "labelled": 35}
    assert np.bincount(labels[heldout], minlength=3).tolist() == [3, 1, 0]
    assert (heldout.dtype, heldout.tolist()) == (np.int64, sorted(heldout.tolist()))


def test_without_labels_everything_else_is_there(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(10):
        picture(f"data/{index}.png", index)
    meta = run(monkeypatch)
    assert (meta["classes"], meta["train"], meta["test"]) == (
        [],
        {"images": 8, "labelled": 0},
        {"images": 2, "labelled": 0},
    )
    assert (array("train", "labels") == -1).all()
    assert array("train", "heldout").shape == (0,)
    assert {row["label"] for row in items("train")} == {""}
    assert json.loads(Path("metrics/prepare.json").read_text())["train_labelled"] == 0


def test_two_runs_write_the_same_bytes_and_no_absolute_path(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes()
    Path("data/dark/broken.png").write_bytes(b"no image")
    run(monkeypatch, max_skipped=0.1)
    first = digest()
    shutil.rmtree("artifacts")
    run(monkeypatch, max_skipped=0.1)
    assert digest() == first
    assert not any(str(workspace).encode() in content for content in first.values())


def test_an_absolute_folder_gives_the_same_outputs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes()
    run(monkeypatch)
    first = digest()
    run(monkeypatch, folder=str(workspace / "data"))
    assert digest() == first


def test_the_content_hash_follows_pixels_and_labels_and_not_names(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture("data/train/a/1.png", 1)
    picture("data/train/b/1.png", 2)
    picture("data/test/a/1.png", 3)
    picture("data/test/b/1.png", 4)
    first = run(monkeypatch)["content_hash"]
    Path("data/train/a/1.png").rename("data/train/a/renamed.png")
    assert run(monkeypatch)["content_hash"] == first
    picture("data/test/b/1.png", 5)
    second = run(monkeypatch)["content_hash"]
    Path("data/train/b").rename("data/train/c")
    Path("data/test/b").rename("data/test/c")
    assert len({first, second, run(monkeypatch)["content_hash"]}) == 3


def test_unreadable_files_are_left_out_and_listed_with_the_reason(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classes()
    Path("data/dark/03.png").write_bytes(b"no image")
    picture("data/light/04.png", 9, side=40)
    meta = run(monkeypatch, max_skipped=0.1, max_pixels=1000, image_size=8)
    assert {item["path"]: item["reason"] for item in meta["skipped"]} == {
        "dark/03.png": "not an image that can be read",
        "light/04.png": "40 x 40 pixels, more than data.max_pixels (1000)",
    }
    assert meta["train"]["images"] + meta["test"]["images"] == 18
    for split in ("train", "test"):
        for row, image in zip(items(split), array(split, "images"), strict=True):
            kind, number = row["path"].removesuffix(".png").split("/")
            assert row["label"] == kind
            assert (image == (int(number) if kind == "dark" else 255 - int(number))).all()
    assert "skipped dark/03.png: not an image that can be read" in capsys.readouterr().out


def test_too_many_unreadable_files_stop_the_stage_and_leave_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classes()
    Path("data/dark/03.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, max_skipped=0.04)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "got 1 of 20 in data, first dark/03.png: not an image" in error
    assert error.count("\n") == 1
    assert not [path for path in Path("artifacts").rglob("*") if path.is_file()]
    run(monkeypatch, max_skipped=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "expected a folder of images at data, found nothing"),
        (lambda: Path("data").mkdir(), "found none among 0 files"),
        (lambda: picture("data/1.png"), "expected test images in data, got none"),
    ],
)
def test_a_folder_that_can_not_be_used_is_one_line_of_error(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make: Any, message: str
) -> None:
    make()
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_names_survive_whatever_their_language_and_punctuation(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ['train/è, "ß"\n/日本.png', "train/b/x.png", "test/b/😀.png", "test/b/y.png"]
    for name in names:
        picture(f"data/{name}")
    run(monkeypatch)
    assert sorted(row["path"] for split in ("train", "test") for row in items(split)) == sorted(names)


def test_images_are_written_in_order_across_chunks(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 3 * 8 * 8)
    classes(40)
    run(monkeypatch)
    for row, image in zip(items("train"), array("train", "images"), strict=True):
        kind, number = row["path"].removesuffix(".png").split("/")
        assert (image == (int(number) if kind == "dark" else 255 - int(number))).all()
