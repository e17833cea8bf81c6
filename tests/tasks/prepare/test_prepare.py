"""The stage prepare: what it writes, for a folder of images."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepclust.datasets import sources
from tasks.prepare import __main__ as prepare
from tasks.prepare import arrays, decoding
from tasks.shared.operations import params
from tasks.sizes import __main__ as sizes_stage
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the stage sets them; this puts them back
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    monkeypatch.setattr("sys.argv", ["prepare"])
    monkeypatch.chdir(tmp_path)
    Path("domains").mkdir()
    return tmp_path


def run(sizes: dict[str, int | str] | None = None, **data: Any) -> dict[str, Any]:
    """Run the stage with these parameters of `data` in the current folder; its meta.json.

    Args:
        sizes: The encoders, which are trained networks but for `pixels`, and the sizes that they are to have; by
            default there is one, of an automatic size.
        data: As in params.yaml.
    """
    values = params.read(ROOT / "params.yaml")
    values["data"] |= {"source": "folder", "folder": "data"} | data
    sizes = sizes or {"swav": "auto"}
    values["encoders"] = {name: "pixels" if name == "pixels" else "swav" for name in sizes}
    for name, size in sizes.items():
        values["pretrain"][name] = values["pretrain"].get(name, values["pretrain"]["swav"]) | {"image_size": size}
    Path("params.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    sizes_stage.main()
    prepare.main()
    meta: dict[str, Any] = json.loads(Path("artifacts/prepare/meta.json").read_text(encoding="utf-8"))
    return meta


def picture(path: str, colour: int | tuple[int, ...] = 100, side: int = 8) -> None:
    Path("data", path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", (side, side), colour).save(Path("data", path))


def noise(*paths: str) -> None:
    """One picture of its own, with many pixels' worth of noise, under each of these names."""
    pixels = np.random.default_rng(list(paths[0].encode())).integers(0, 256, (8, 8), dtype=np.uint8)
    for path in paths:
        Path("data", path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(Path("data", path))


def sides() -> dict[str, str]:
    """Where each image is: train, heldout or test."""
    heldout = set(array("train", "heldout").tolist())
    train = {row["path"]: "heldout" if int(row["index"]) in heldout else "train" for row in items("train")}
    return train | {row["path"]: "test" for row in items("test")}


def classes(count: int = 10) -> None:
    """Two classes of so many grey images, each image of a brightness of its own."""
    for index in range(count):
        picture(f"dark/{index:02d}.png", index)
        picture(f"light/{index:02d}.png", 255 - index)


def array(split: str, name: str) -> np.ndarray:
    place = Path("artifacts/prepare", split, f"{name}.npy")
    if name == "images":
        described = json.loads(Path("artifacts/prepare/encoders/swav.json").read_text())
        place = Path("artifacts/prepare/images", str(described["image_size"]), f"{split}.npy")
    loaded: np.ndarray = np.load(place, allow_pickle=False)
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
    monkeypatch.setattr(decoding, "_INSPECTED_AT_ONCE", 3)
    classes(40)
    meta = run()
    counts = {split: len(items(split)) for split in ("train", "test")}
    assert sum(counts.values()) == 80
    for split, count in counts.items():
        images, labels = array(split, "images"), array(split, "labels")
        assert (images.shape, images.dtype, labels.dtype) == ((count, 8, 8, 1), np.uint8, np.int64)
        assert meta[split] == {"images": count, "labelled": count}
        assert in_one_order(split)
        assert [row["path"] for row in items(split)] == sorted(row["path"] for row in items(split))
        for row in items(split):
            assert row["id"] == hashlib.sha256(Path("data", row["path"]).read_bytes()).hexdigest()
    assert {path.name for path in Path("artifacts/prepare").rglob("*")} == {
        *(
            *("train", "test", "labels.npy", "items.csv", "heldout.npy"),
            *("images", "8", "train.npy", "test.npy", "encoders", "swav.json"),
            *("meta.json", "lineage.json"),
        )
    }


@pytest.mark.parametrize("more", [1, 10])
def test_no_new_image_moves_another_one_to_another_side(more: int) -> None:
    for index in range(120):
        noise(f"{'abc'[index % 3]}/{index}.png")
    run()
    before = sides()
    assert 12 <= list(before.values()).count("test") <= 36, "24 are expected, four standard deviations are 18"
    for index in range(more):
        noise(f"a/0{index}.png")
    Path("data/b/1.png").rename("data/b/renamed.png")
    Path("data/c/2.png").unlink()
    run()
    after = sides()
    after["b/1.png"] = after.pop("b/renamed.png")
    assert {path: after[path] for path in before if path != "c/2.png"} == {
        path: side for path, side in before.items() if path != "c/2.png"
    }
    assert len(after) == 119 + more


def into_dvcs_cache(folder: str) -> None:
    """What DVC does with the outputs before it runs the stage again, in a cache that is not in its usual place."""
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text(f"[core]\n    analytics = false\n[cache]\n    dir = ../{folder}\n")

    def put(content: bytes, suffix: str = "") -> str:
        md5 = hashlib.md5(content).hexdigest() + suffix
        target = Path(folder, "files/md5", md5[:2], md5[2:])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return md5

    root = Path("artifacts/prepare")
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    listing = [{"md5": put(path.read_bytes()), "relpath": path.relative_to(root).as_posix()} for path in files]
    locked = put(json.dumps(listing).encode(), ".dir")
    Path("dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  embed@x:\n    cmd: x\n    outs:\n    - path: artifacts/embed/x\n      hash: md5\n"
        "      md5: 0.dir\n  prepare:\n    cmd: python -m tasks.prepare\n    deps:\n    - path: data\n      hash: md5\n"
        "      md5: 1.dir\n    params:\n      params.yaml:\n        seed: 0\n    outs:\n    - path: artifacts/prepare\n"
        f"      hash: md5\n      md5: {locked}\n      size: 1\n      nfiles: 9\n    - path: metrics/prepare.json\n"
        "      hash: md5\n      md5: '2'\n"
    )
    shutil.rmtree(root)


@pytest.mark.parametrize("where", ["by hand", "in DVC's cache", "by an earlier version", "lost"])
def test_images_that_change_sides_against_the_last_preparation_are_counted(
    where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(60):
        noise(f"{'ab'[index % 2]}/{index}.png")
    run()
    before = sides()
    if where == "by an earlier version":
        for split in ("train", "test"):
            rows = ["index,path,label", *(f"{row['index']},{row['path']},{row['label']}" for row in items(split))]
            Path(f"artifacts/prepare/{split}/items.csv").write_text("\n".join(rows) + "\n")
    elif where != "by hand":
        into_dvcs_cache("cache")
    if where == "lost":
        shutil.rmtree("cache")
    noise("a/new.png")
    capsys.readouterr()
    run(test_fraction=0.4)
    after = sides()
    moved = sum(after[path] != side for path, side in before.items())
    counts = [list(found.values()).count(side) for side in ("test", "heldout") for found in (before, after)]
    said = [line for line in capsys.readouterr().out.splitlines() if "another side" in line]
    text = f"warning: {moved} of 60 images that were prepared before are on another side now (test {counts[0]} → "
    text += f"{counts[1]}, held out {counts[2]} → {counts[3]}): numbers on these are not comparable with earlier ones"
    assert said == ([] if where == "lost" else [text])
    noise("a/newer.png")
    run(test_fraction=0.4)
    assert "another side" not in capsys.readouterr().out, "one image more moves none"


def test_copies_of_an_image_are_on_one_side_and_counted() -> None:
    for index in range(20):
        noise(*(f"{'ab'[index % 2]}/{index}-{copy}.png" for copy in range(5)))
    Image.open("data/a/0-1.png").save("data/a/0-2.bmp")  # other bytes, the same pixels
    shutil.copy("data/a/0-1.png", "data/b/0-3.png")  # another label
    meta = run(test_fraction=0.4, heldout_fraction=0.4)
    (warning,) = meta["warnings"]
    assert "82 of 102 images are copies of others" in warning
    assert "1 image has copies with different labels" in warning
    found = sides()
    by_picture: dict[str, set[str]] = {}
    for path, side in found.items():
        by_picture.setdefault(path.split("/")[1].split("-")[0], set()).add(side)
    assert all(len(on) == 1 for on in by_picture.values())
    assert {side for on in by_picture.values() for side in on} == {"train", "heldout", "test"}


def test_a_test_folder_stays_and_training_images_that_are_in_it_are_left_out() -> None:
    for side in ("train", "test"):
        for index in range(6):
            noise(f"{side}/{'ab'[index % 2]}/{index}.png")
    shutil.copy("data/test/a/2.png", "data/train/a/copied.png")
    Image.open("data/test/b/3.png").save("data/train/b/other.bmp")
    shutil.copy("data/test/a/2.png", "data/test/a/again.png")
    meta = run()
    assert (meta["train"]["images"], meta["test"]["images"]) == (6, 7)
    assert not {"train/a/copied.png", "train/b/other.bmp"} & set(sides())
    assert "2 training images are test images too, and are left out" in meta["warnings"][0]
    assert meta["left_out"] == [
        {"path": "train/a/copied.png", "reason": "identical to the test image test/a/2.png"},
        {"path": "train/b/other.bmp", "reason": "identical to the test image test/b/3.png"},
    ]


def test_a_published_data_set_is_only_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    images[11] = images[3]
    labels = np.arange(12) % 2
    parts = ["0", "1"], (images[:8], labels[:8]), (images[8:], labels[8:])
    monkeypatch.setitem(sources.LOADERS, "MNIST", lambda: parts)
    meta = run(source="MNIST")
    assert (array("train", "images") == images[:8]).all()
    assert (array("test", "images") == images[8:]).all()
    assert [row["path"] for row in items("test")] == [f"test/{index:06d}" for index in range(4)]
    assert "1 training image is a test image too, and stays as published" in meta["warnings"][0]


def test_a_class_without_a_drawn_test_image_is_named_with_the_remedy() -> None:
    for index in range(40):
        noise(f"often/{index}.png")
    noise("single/0.png")
    (warning,) = run()["warnings"]
    side = sides()["single/0.png"].replace("heldout", "train")
    other = {"train": "test", "test": "train"}[side]
    assert f"1 of 2 classes has no {other} image, but {side} images: single (1); add images" in warning
    assert "data.test_fraction, or make a test folder" in warning


def test_nothing_is_written_into_the_folder_of_images() -> None:
    classes()
    listing = {path: path.stat().st_mtime_ns for path in [Path("data"), *Path("data").rglob("*")]}
    run()
    assert {path: path.stat().st_mtime_ns for path in [Path("data"), *Path("data").rglob("*")]} == listing


def test_statistics_are_those_of_the_training_images() -> None:
    for index, colour in enumerate([(10, 0, 90), (250, 0, 7), (30, 0, 200), (77, 0, 13)]):
        picture(f"train/{index}.png", colour)
    picture("test/0.png", (255, 255, 255))
    run()
    statistics = json.loads(Path("artifacts/prepare/encoders/swav.json").read_text())
    values = array("train", "images").reshape(-1, 3) / 255
    assert statistics["mean"] == pytest.approx(values.mean(0).tolist(), abs=1e-6)
    expected = np.where([True, False, True], values.std(0), 1 / 255)  # a constant channel is divided by this
    assert statistics["std"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert (statistics["image_size"], statistics["channels"], statistics["resize"]) == (8, 3, "crop")


def test_automatic_colour_is_rgb_as_soon_as_one_image_has_colour_and_a_stated_one_is_kept_to() -> None:
    picture("train/1.png", 90)
    picture("test/1.png", 91)
    for colour, channels in (((5, 5, 5), 1), ((5, 5, 6), 3)):
        picture("test/2.png", colour)
        assert run()["channels"] == channels
        assert array("train", "images").shape == (1, 8, 8, channels)
        assert (array("test", "images")[1, 0, 0] == np.array(colour)[:channels]).all()
    assert run({"swav": 16}, colour="grey")["channels"] == 1
    assert array("test", "images").shape == (2, 16, 16, 1)


@pytest.mark.parametrize(("lengths", "expected"), [((9, 20, 31), 20), ((4, 4, 4), 8), ((100, 200, 300), 64)])
def test_the_automatic_size_is_the_median_shorter_side_of_training_images_within_bounds(
    lengths: tuple[int, ...], expected: int
) -> None:
    Path("data/train/a").mkdir(parents=True)
    for index, length in enumerate(lengths):
        Image.new("L", (length, 2 * length), index).save(f"data/train/a/{index}.png")
    Path("data/train/a/broken.png").write_bytes(b"no image")
    for index in range(5):
        noise(f"test/a/{index}.png")
    run(max_skipped=0.5)
    assert array("train", "images").shape[1] == expected


def test_held_out_images_are_labelled_training_images() -> None:
    for index in range(60):
        noise(f"train/a/{index}.png")
        noise(f"train/unlabelled/{index}.png")
    for path in ("test/a/0", "test/b/0", "train/b/0"):
        noise(f"{path}.png")
    meta = run(heldout_fraction=0.3)
    heldout = array("train", "heldout")
    assert meta["train"] == {"images": 121, "labelled": 61}
    assert 8 <= len(heldout) <= 29, "18 are expected, three standard deviations are 11"
    assert (array("train", "labels")[heldout] >= 0).all()
    assert (heldout.dtype, heldout.tolist()) == (np.int64, sorted(set(heldout.tolist())))


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


def test_domains_are_checked_before_anything_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    classes()
    Path("domains/sketch/darker").mkdir(parents=True)
    Path("domains/sketch/darker/1.png").write_bytes(b"is not opened")
    run()
    assert "warning: the domain sketch has folders that are no classes of the training data" in capsys.readouterr().out
    Path("domains/1.png").touch()
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "got the image 1.png beside them; move it into one" in capsys.readouterr().err


def test_unreadable_files_are_left_out_and_listed_up_to_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "expected a folder of images at data, found nothing" in capsys.readouterr().err
    classes()
    Path("data/dark/03.png").write_bytes(b"no image")
    picture("light/04.png", 9, side=40)
    with pytest.raises(SystemExit, match="2"):
        run(max_skipped=0.09, max_pixels=1000)
    error = capsys.readouterr().err
    assert "got 2 of 20 in data, first dark/03.png: not an image" in error
    assert error.count("\n") == 1
    assert not list(Path("artifacts/prepare").rglob("*"))
    meta = run(max_skipped=0.1, max_pixels=1000)
    assert {item["path"]: item["reason"] for item in meta["skipped"]} == {
        "dark/03.png": "not an image that can be read",
        "light/04.png": "40 x 40 pixels, more than data.max_pixels (1000)",
    }
    assert meta["train"]["images"] + meta["test"]["images"] == 18
    assert in_one_order("train")
    assert in_one_order("test")
    said = capsys.readouterr().out
    assert "skipped dark/03.png: not an image that can be read" in said
    assert "2 classes (dark, light), " in said


def test_images_of_formats_that_nothing_reads_count_as_skipped_and_those_of_system_folders_as_ignored(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes()
    Path("data/dark/@eaDir").mkdir()
    for name in ("dark/a.nef", "light/b.psd", "dark/@eaDir/thumb.jpg", "notes.txt"):
        Path("data", name).write_bytes(b"x")
    Path("data/light/far.png").symlink_to(workspace / "none.png")
    with pytest.raises(SystemExit, match="2"):
        run(max_skipped=0.1)
    assert "got 3 of 23 in data, first dark/a.nef: camera raw: develop it to TIFF or JPEG" in capsys.readouterr().err
    meta = run(max_skipped=0.2)
    assert [item["path"] for item in meta["skipped"]] == ["dark/a.nef", "light/b.psd", "light/far.png"]
    assert meta["ignored"] == 2
    assert "ignored images in folders of a NAS or desktop: 1 in @eaDir" in meta["warnings"]
    picture("../none.png", 200)  # now the link leads to an image
    for follow, count in ((False, 20), (True, 21)):
        meta = run(max_skipped=0.2, follow_links=follow)
        assert meta["train"]["images"] + meta["test"]["images"] == count


def test_a_folder_with_a_stack_of_medmnists_layout_is_prepared_as_it_states() -> None:
    random = np.random.default_rng(0)
    Path("data").mkdir()
    counts = {"train": 30, "val": 5, "test": 8}
    arrays = {f"{side}_images": random.integers(0, 256, (count, 28, 28), np.uint8) for side, count in counts.items()}
    arrays |= {f"{side}_labels": random.integers(0, 3, (count, 1)) for side, count in counts.items()}
    np.savez_compressed("data/somemnist.npz", **arrays)
    meta = run(heldout_fraction=0.2)
    assert (meta["classes"], meta["held"], meta["channels"]) == (["0", "1", "2"], 28, 1)
    for split in ("train", "test"):
        assert np.array_equal(array(split, "images")[..., 0], arrays[f"{split}_images"])
        assert np.array_equal(array(split, "labels"), arrays[f"{split}_labels"][:, 0])
    assert items("test")[3]["path"] == "somemnist.npz/test/000003"


def test_images_of_several_depths_are_warned_of_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    noise(*(f"{number}.png" for number in range(3)))
    for number in range(5):
        Image.fromarray(np.full((8, 8), 500 + number, np.uint16)).save(f"data/deep{number}.png")
    meta = run()
    assert meta["warnings"][0] == (
        "images of several depths, whose brightness may not be comparable: 3 of 8 bits, 5 of uint16; convert all to "
        "one depth"
    )
    assert f"warning: {meta['warnings'][0]}\n" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["tif", "gif", "webp"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pages_that_are_not_read_are_warned_of(suffix: str, mode: str) -> None:
    noise("0.png")
    noise("1.png")
    pages = [Image.new("L", (8, 8), level).convert(mode) for level in (10, 90, 200)]
    pages[0].save(f"data/2.{suffix}", save_all=True, append_images=pages[1:])
    assert run()["warnings"] == ["1 of 3 images has several pages; the first is read (data.pages)"]
    assert run(pages="middle", max_skipped=0.9)["warnings"] == []


def test_pages_of_deep_tiffs_are_warned_of_and_bands_are_no_pages() -> None:
    tifffile = pytest.importorskip("tifffile")
    for number in range(3):
        noise(f"{number}.png")
    planes = np.random.default_rng(0).integers(0, 4096, (3, 8, 8), np.uint16)
    tifffile.imwrite("data/bands.tif", planes, imagej=True, metadata={"axes": "CYX"})
    assert not [text for text in run()["warnings"] if "pages" in text]
    tifffile.imwrite("data/slices.tif", planes, imagej=True, metadata={"axes": "ZYX"})
    assert "1 of 5 images has several pages; the first is read (data.pages)" in run()["warnings"]


def test_files_that_are_skipped_for_one_reason_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        noise(f"{number}.png")
    for number in range(30):
        Path(f"data/{number:02}.nef").write_bytes(b"II*\0 a camera's")
    picture("a.png", side=40)
    picture("b.png", side=41)
    Path("data/30.psd").write_bytes(b"8BPS")
    assert len(run(max_skipped=0.9, max_pixels=1000)["skipped"]) == 33
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert lines == [
        "skipped 30 files, first 00.nef: camera raw: develop it to TIFF or JPEG",
        "skipped 30.psd: Photoshop: convert it to PNG",
        "skipped 2 files, first a.png: 40 x 40 pixels, more than data.max_pixels (1000)",
    ]


def test_what_an_encoder_gets_does_not_depend_on_the_other_encoders_of_the_list() -> None:
    """Neither its images nor the sides that they are on, nor the names of what was seen."""
    random = np.random.default_rng(0)
    for index in range(20):
        height, width = random.integers(60, 200, 2)
        picture = np.kron(random.integers(0, 256, (4, 4, 3)), np.ones((height // 4, width // 4, 1)))
        path = Path(f"data/{'ab'[index % 2]}/{index}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path)
    found = {}
    for name, sizes in {
        "alone": {"swav": 24},
        "others": {"large": 90, "swav": 24, "own": "auto", "pixels": 16},
    }.items():
        run(sizes)
        found[name] = digest()
    kept = {path: content for path, content in found["alone"].items() if Path(path).name != "lineage.json"}
    assert "artifacts/prepare/images/24/train.npy" in kept
    assert {path: found["others"][path] for path in kept if "sizes" not in path} == {
        path: content for path, content in kept.items() if "sizes" not in path
    }


def test_networks_get_the_size_that_is_stated_and_pixels_at_most_what_the_images_hold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for index in range(4):
        picture(f"train/{index}.png", index, side=20)
        picture(f"test/{index}.png", 50 + index, side=20)
    assert run({"swav": 32, "pixels": 32, "small": 12, "own": "auto"})["held"] == 20
    kept = {path.stem: json.loads(path.read_text()) for path in Path("artifacts/prepare/encoders").iterdir()}
    assert {name: own["image_size"] for name, own in kept.items()} == {"swav": 32, "pixels": 20, "small": 12, "own": 20}
    assert {own["held"] for own in kept.values()} == {20}
    for own in kept.values():
        for split, sha256 in own["images"].items():
            path = Path("artifacts/prepare/images", str(own["image_size"]), f"{split}.npy")
            assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert "warning: swav is to have images of 32 px, which are enlarged: they hold 20" in capsys.readouterr().out


def test_the_order_of_encoders_is_no_reason_to_decode_again() -> None:
    for index in range(4):
        picture(f"{index}.png", index)
    run({"swav": 16, "pixels": 8})
    before = Path("artifacts/sizes/sizes.json").read_bytes()
    run({"pixels": 8, "swav": 16})
    assert Path("artifacts/sizes/sizes.json").read_bytes() == before


def test_of_many_images_some_are_drawn_with_their_own_pixels_and_labels_whatever_else_is_there() -> None:
    classes(10)
    run()
    whole = {row["path"]: (row["label"], row["id"]) for split in ("train", "test") for row in items(split)}
    meta = run(images=12)
    drawn = {row["path"]: (row["label"], row["id"]) for split in ("train", "test") for row in items(split)}
    assert len(drawn) == meta["train"]["images"] + meta["test"]["images"] == 12
    assert drawn.items() <= whole.items()
    smallest = sorted(whole, key=lambda path: hashlib.sha256(f"0/subset/{path}".encode()).digest())
    assert set(drawn) == set(smallest[:12])
    assert run(images=20)["content_hash"] == run()["content_hash"]
