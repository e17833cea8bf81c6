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


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the stage sets them; this puts them back
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    monkeypatch.setattr("sys.argv", ["prepare"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(**data: Any) -> dict[str, Any]:
    """Run the stage with these parameters of `data` in the current folder; its meta.json."""
    values = params.read(ROOT / "params.yaml")
    values["data"] |= {"source": "folder", "folder": "data"} | data
    Path("params.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    prepare.main()
    meta: dict[str, Any] = json.loads(Path("artifacts/prepare/meta.json").read_text(encoding="utf-8"))
    return meta


def picture(path: str, colour: int | tuple[int, ...] = 100, side: int = 8) -> None:
    Path("data", path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", (side, side), colour).save(Path("data", path))


def classes(count: int = 10) -> None:
    """Two classes of so many grey images, each image of a brightness of its own."""
    for index in range(count):
        picture(f"dark/{index:02d}.png", index)
        picture(f"light/{index:02d}.png", 255 - index)


def array(split: str, name: str) -> np.ndarray:
    loaded: np.ndarray = np.load(f"artifacts/prepare/{split}/{name}.npy", allow_pickle=False)
    return loaded


def items(split: str) -> list[dict[str, str]]:
    with Path(f"artifacts/prepare/{split}/items.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def in_one_order(split: str) -> bool:
    """Whether images, labels and items of `classes` are those of each other."""
    rows, names = items(split), json.loads(Path("artifacts/prepare/meta.json").read_text())["classes"]
    assert [int(row["index"]) for row in rows] == list(range(len(rows)))
    for row, image, label in zip(rows, array(split, "images"), array(split, "labels"), strict=True):
        kind, number = row["path"].removesuffix(".png").split("/")
        assert row["label"] == kind == names[label]
        assert (image == (int(number) if kind == "dark" else 255 - int(number))).all()
    return True


def digest() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path("artifacts").rglob("*")) if path.is_file()}


def test_images_labels_and_items_are_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 3 * 8 * 8)  # several chunks
    classes(40)
    meta = run()
    for split, count in (("train", 64), ("test", 16)):
        images, labels = array(split, "images"), array(split, "labels")
        assert (images.shape, images.dtype, labels.dtype) == ((count, 8, 8, 1), np.uint8, np.int64)
        assert meta[split] == {"images": count, "labelled": count}
        assert in_one_order(split)


def test_statistics_are_those_of_the_training_images() -> None:
    for index, colour in enumerate([(10, 0, 90), (250, 0, 7), (30, 0, 200), (77, 0, 13)]):
        picture(f"train/{index}.png", colour)
    picture("test/0.png", (255, 255, 255))
    run()
    statistics = json.loads(Path("artifacts/prepare/statistics.json").read_text())
    values = array("train", "images").reshape(-1, 3) / 255
    assert statistics["mean"] == pytest.approx(values.mean(0).tolist(), abs=1e-6)
    expected = np.where([True, False, True], values.std(0), 1 / 255)  # a constant channel is divided by this
    assert statistics["std"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert (statistics["image_size"], statistics["channels"], statistics["resize"]) == (8, 3, "crop")


def test_automatic_colour_is_rgb_as_soon_as_one_image_has_colour_and_a_stated_one_is_kept_to() -> None:
    picture("train/1.png", 90)
    picture("test/1.png", 90)
    for colour, channels in (((5, 5, 5), 1), ((5, 5, 6), 3)):
        picture("test/2.png", colour)
        assert run()["channels"] == channels
        assert array("train", "images").shape == (1, 8, 8, channels)
        assert (array("test", "images")[1, 0, 0] == np.array(colour)[:channels]).all()
    assert run(colour="grey", image_size=16)["channels"] == 1
    assert array("test", "images").shape == (2, 16, 16, 1)


def test_held_out_images_are_a_labelled_share_of_each_class() -> None:
    for index in range(30):
        picture(f"train/a/{index}.png")
        picture(f"train/unlabelled/{index}.png")
    for path in ("train/b/0", "train/b/1", "train/b/2", "train/b/3", "train/single/0", "test/a/0", "test/b/0"):
        picture(f"{path}.png")
    meta = run()
    heldout = array("train", "heldout")
    assert meta["train"] == {"images": 65, "labelled": 35}
    assert np.bincount(array("train", "labels")[heldout], minlength=3).tolist() == [3, 1, 0]
    assert (heldout.dtype, heldout.tolist()) == (np.int64, sorted(heldout.tolist()))


def test_without_labels_everything_else_is_there() -> None:
    for index in range(10):
        picture(f"{index}.png", index)
    meta = run()
    assert (meta["classes"], meta["test"]) == ([], {"images": 2, "labelled": 0})
    assert (array("train", "labels") == [-1] * 8).all()
    assert array("train", "heldout").shape == (0,)
    assert {row["label"] for row in items("train")} == {""}
    assert json.loads(Path("metrics/prepare.json").read_text())["train_labelled"] == 0


def test_runs_on_the_same_images_write_the_same_bytes_and_no_absolute_path(workspace: Path) -> None:
    classes()
    Path("data/dark/broken.png").write_bytes(b"no image")
    run(max_skipped=0.1)
    first = digest()
    shutil.rmtree("artifacts")
    run(max_skipped=0.1, folder=str(workspace / "data"))
    assert digest() == first
    assert not any(str(workspace).encode() in content for content in first.values())


def test_the_content_hash_follows_pixels_and_labels_and_not_names() -> None:
    for value, path in enumerate(("train/a/1", "train/b/1", "test/a/1", "test/b/1")):
        picture(f"{path}.png", value)
    first = run()["content_hash"]
    Path("data/train/a/1.png").rename("data/train/a/renamed.png")
    assert run()["content_hash"] == first
    picture("test/b/1.png", 5)
    second = run()["content_hash"]
    Path("data/train/b").rename("data/train/c")
    Path("data/test/b").rename("data/test/c")
    assert len({first, second, run()["content_hash"]}) == 3


def test_unreadable_files_are_left_out_and_listed_up_to_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "expected a folder of images at data, found nothing" in capsys.readouterr().err
    classes()
    Path("data/dark/03.png").write_bytes(b"no image")
    picture("light/04.png", 9, side=40)
    options = {"max_pixels": 1000, "image_size": 8}
    with pytest.raises(SystemExit, match="2"):
        run(max_skipped=0.09, **options)
    error = capsys.readouterr().err
    assert "got 2 of 20 in data, first dark/03.png: not an image" in error
    assert error.count("\n") == 1
    assert not [path for path in Path("artifacts").rglob("*") if path.is_file()]
    meta = run(max_skipped=0.1, **options)
    assert {item["path"]: item["reason"] for item in meta["skipped"]} == {
        "dark/03.png": "not an image that can be read",
        "light/04.png": "40 x 40 pixels, more than data.max_pixels (1000)",
    }
    assert meta["train"]["images"] + meta["test"]["images"] == 18
    assert in_one_order("train")
    assert in_one_order("test")
    assert "skipped dark/03.png: not an image that can be read" in capsys.readouterr().out
