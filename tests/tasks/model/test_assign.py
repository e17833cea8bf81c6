"""New images to clusters and classes, by hand: an encoder that flattens images of one brightness each."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deepclust import bundle
from deepclust.clustering import confidence
from deepclust.clustering.assigners import Layers
from deepclust.models import encoder
from tasks.model import assign
from tasks.shared.outputs import lineage
from tests.paths import ROOT

SIDE, MEAN, STD = 8, 0.5, 0.25
BRIGHTNESS = {"dark.png": 20, "middle.png": 128, "sub/dark.png": 30, "sub/deep/light.png": 230}
Run = Callable[..., dict[str, dict[str, Any]]]
said: list[str] = []  # on stderr in the last run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `tasks.assign` where there are two clusters, dark and light, and no classifier; the rows on stdout."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").symlink_to(ROOT / "params.yaml")
    for stage in ("pretrain/pixels", "cluster/pixels", "linear/pixels", "prepare"):
        (tmp_path / "artifacts" / stage).mkdir(parents=True)
    pixels = encoder.Encoder(backbone="pixels", image_size=SIDE, channels=1, mean=[MEAN], std=[STD])
    encoder.save(pixels, Path("artifacts/pretrain/pixels"))
    clusters(SIDE**2)
    Path("artifacts/prepare/encoders").mkdir()
    Path("artifacts/prepare/encoders/pixels.json").write_text(json.dumps({"resize": "stretch", "image_size": SIDE}))
    for name, value in BRIGHTNESS.items():
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 20), value).save(tmp_path / "new" / name)

    def main(*words: str) -> dict[str, dict[str, Any]]:
        for stage in ("pretrain/pixels", "cluster/pixels", "linear/pixels", "prepare"):
            lineage.write(Path("artifacts", stage), {})
        most = [] if "--max-skipped" in words else ["--max-skipped", "1"]
        monkeypatch.setattr("sys.argv", ["assign", "--encoder", "pixels", *most, *words])
        assign.main()
        captured = capsys.readouterr()
        said[:] = captured.err.splitlines()
        return rows(captured.out)

    return main


def clusters(dim: int, side: float = 1, *, normalise: bool = False) -> None:
    """Two, dark and light."""
    np.save("artifacts/cluster/pixels/centroids.npy", np.array([[-side] * dim, [side] * dim], np.float32))
    Path("artifacts/cluster/pixels/cluster.json").write_text(json.dumps({"k": 2, "normalise": normalise}))


def rows(text: str) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in csv.DictReader(io.StringIO(text))}


def feature(value: int) -> np.ndarray:
    """By hand what the encoder makes of an image of one brightness."""
    return np.full(SIDE**2, (value / 255 - MEAN) / STD)


def test_each_image_goes_to_its_nearest_centroid_and_a_classifier_adds_class_and_probability(run: Run) -> None:
    weight = np.stack([np.zeros(SIDE**2), np.full(SIDE**2, 0.01)]).astype(np.float32)
    tensors = {"weight": torch.from_numpy(weight), "bias": torch.tensor([0.0, 0.1])}
    save_file(tensors, "artifacts/linear/pixels/classifier.safetensors")
    Path("artifacts/linear/pixels/classifier.json").write_text(json.dumps({"classes": ["night", "day"]}))
    table = run("new")
    assert list(table) == sorted(BRIGHTNESS)
    for name, value in BRIGHTNESS.items():
        row, distances = table[name], [np.linalg.norm(feature(value) - centre) for centre in (-1, 1)]
        assert int(row["cluster"]) == np.argmin(distances)
        squared = np.square(distances) / (4 * SIDE**2)  # in units of what separates the two centroids
        assert float(row["confidence"]) == pytest.approx(1 / (1 + np.exp(-abs(squared[1] - squared[0]))), rel=1e-4)
        assert float(row["distance"]) == pytest.approx(min(distances), rel=1e-5)
        day = 1 / (1 + np.exp(-0.01 * feature(value).sum() - 0.1))
        assert row["class"] == ("day" if day > 0.5 else "night")
        assert float(row["probability"]) == pytest.approx(max(day, 1 - day), rel=1e-4)
    clusters(SIDE**2, 1 / SIDE, normalise=True)
    row = run("new/dark.png")["dark.png"]
    assert (row["cluster"], float(row["distance"])) == ("0", pytest.approx(0, abs=1e-6))


def test_an_image_of_low_confidence_has_the_cluster_minus_one_and_a_folder_of_its_own(run: Run) -> None:
    head = Layers([(torch.stack([-torch.ones(SIDE**2), torch.ones(SIDE**2)]) / SIDE**2, torch.zeros(2))])
    train = torch.tensor([[-1.8], [-1.0], [-0.1], [1.2]]).expand(-1, SIDE**2)
    fitted = confidence.fit(head, train, normalise=False, algorithm="spectral", reject=0.25)[0]
    fitted.save(Path("artifacts/cluster/pixels"))
    table = run("new", "--export", "sorted")
    assert [row["cluster"] for row in table.values()] == ["0", "-1", "0", "1"]
    assert list(table) == ["dark.png", "middle.png", "sub/dark.png", "sub/deep/light.png"]
    for name, row in table.items():
        sure = 1 / (1 + np.exp(-2 * abs(feature(BRIGHTNESS[name])[0])))
        sure *= min(1, fitted.reach / float(row["distance"])) / 2  # all neighbours, copies aside, are of the other side
        assert float(row["confidence"]) == pytest.approx(sure, rel=1e-4)
        assert fitted.reject
        assert (row["cluster"] == "-1") == (sure < fitted.reject)
    assert sorted(str(path.relative_to("sorted")) for path in Path("sorted").rglob("*.png")) == [
        "cluster-00/dark.png",
        "cluster-00/sub/dark.png",
        "cluster-01/sub/deep/light.png",
        "no-cluster/middle.png",
    ]


def test_grey_images_reach_a_larger_network_of_three_channels(run: Run) -> None:
    shape: dict[str, Any] = {"image_size": SIDE, "channels": 1, "network_channels": 3, "input_size": 2 * SIDE}
    wide = encoder.Encoder(backbone="pixels", mean=[MEAN] * 3, std=[STD] * 3, **shape)
    encoder.save(wide, Path("artifacts/pretrain/pixels"))
    dim = 3 * (2 * SIDE) ** 2
    clusters(dim)
    for name, row in run("new").items():
        assert list(row) == ["path", "cluster", "distance", "confidence"]
        value = feature(BRIGHTNESS[name])[0]
        assert float(row["distance"]) == pytest.approx(min(abs(value + 1), abs(value - 1)) * np.sqrt(dim), rel=1e-5)


@pytest.mark.parametrize("how", ["--copy", "--link"])
def test_table_embeddings_and_exported_files_have_the_same_rows_whatever_the_chunk(
    run: Run, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(assign, "_CHUNK_BYTES", 3 * SIDE**2)
    Path("new/broken.png").write_bytes(b"no image")
    assert run("new", "--out", "table.csv", "--embeddings", "e.npy", "--export", "sorted", how) == {}
    assert said == [
        "skipped broken.png: not an image that can be read",
        "4 images assigned, 1 skipped, 0 other files ignored",
    ]
    table = rows(Path("table.csv").read_text(encoding="utf-8"))
    assert list(table) == sorted(BRIGHTNESS)
    embeddings = np.load("e.npy", allow_pickle=False)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, np.stack([feature(BRIGHTNESS[name]) for name in table]), atol=1e-6)
    files = {str(path.relative_to("sorted")): path for path in Path("sorted").rglob("*.png")}
    assert sorted(files) == sorted(f"cluster-0{row['cluster']}/{name}" for name, row in table.items())
    for name, path in files.items():
        assert path.is_symlink() == (how == "--link")
        assert path.read_bytes() == Path("new", name.split("/", 1)[1]).read_bytes()


def test_an_existing_file_is_replaced_only_when_asked_and_behind_a_link_its_target(run: Run) -> None:
    Path("real.csv").write_text("mine")
    Path("table.csv").symlink_to("real.csv")
    for path in ("real.csv", "table.csv"):
        with pytest.raises(SystemExit, match="2"):
            run("new", "--out", path)
        assert Path("real.csv").read_text() == "mine"
    run("new", "--out", "table.csv", "--overwrite")
    assert Path("table.csv").is_symlink()
    assert list(rows(Path("real.csv").read_text())) == sorted(BRIGHTNESS)
    Path("new.csv").symlink_to("sub/made.csv")  # which is not there yet
    Path("sorted").symlink_to("really", target_is_directory=True)
    run("new", "--out", "new.csv", "--export", "sorted")
    assert list(rows(Path("sub/made.csv").read_text())) == sorted(BRIGHTNESS)
    assert sorted(path.name for path in Path("really").iterdir()) == ["cluster-00", "cluster-01"]


def test_pipes_and_devices_are_written_to_whole_or_not_at_all(run: Run, tmp_path: Path) -> None:
    os.mkfifo("pipe")
    with ThreadPoolExecutor() as pool:
        content = pool.submit(Path("pipe").read_text)
        run("new", "--out", "pipe", "--embeddings", "/dev/null")
        assert list(rows(content.result(timeout=30))) == sorted(BRIGHTNESS)
    assert stat.S_ISFIFO(Path("pipe").lstat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").lstat().st_mode)
    with Path("log").open("w") as log, ThreadPoolExecutor() as pool:
        log.write("before\n")
        log.flush()
        run("new", "--out", f"/dev/fd/{log.fileno()}")  # as /dev/stdout is where a shell redirects it
        before, _, table = Path("log").read_text().partition("\n")
        assert (before, list(rows(table))) == ("before", sorted(BRIGHTNESS))
        content = pool.submit(Path("pipe").read_bytes)
        with pytest.raises(SystemExit, match="2"):
            run("new", "--out", "pipe", "--max-skipped", "-1")
        Path("pipe").write_bytes(b"")  # lets the reader go
        assert content.result(timeout=30) == b""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--out", "a", "--embeddings", "new/../a"], "--embeddings and --out in two places"),
        (["--out", "same", "--embeddings", "a"], "in two places"),
        (["--out", "a/t.csv", "--export", "a"], "--export and --out in two places"),
        (["--out", "a", "--export", "a/sorted"], "--out and --export in two places"),
        (["--embeddings", "/dev/stdout"], "in two places"),
        (["--out", "new"], "expected a file for --out, got the folder new"),
        (["--out", "loop"], "got loop (Too many levels of symbolic links); name another"),
        (["--export", "plain/x"], "got plain/x (Not a directory); name another"),
        (["--max-skipped", "2"], "--max-skipped: expected less than or equal to 1, got 2.0"),
        (["--embeddings", "there.npy"], "expected a new file for --embeddings, there.npy is there"),
    ],
)
def test_places_that_do_not_fit_are_one_line_before_any_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    Path("same").symlink_to("a")
    Path("loop").symlink_to("loop")
    Path("plain").touch()
    Path("there.npy").write_bytes(b"mine")
    before = sorted(Path().glob("*"))
    monkeypatch.setattr(assign, "find", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(SystemExit, match="2"):
        run("new", *words)
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert sorted(Path().glob("*")) == before
    assert Path("there.npy").read_bytes() == b"mine"


def test_a_failure_half_way_leaves_neither_table_nor_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign, "_CHUNK_BYTES", 1)
    steps = iter([bundle.Bundle.assign, None])
    monkeypatch.setattr(bundle.Bundle, "assign", lambda *given, **options: next(steps)(*given, **options))
    before = sorted(Path().iterdir())
    with pytest.raises(TypeError, match="not callable"):
        run("new", "--out", "t.csv", "--embeddings", "e.npy", "--export", "sorted")
    assert sorted(Path().iterdir()) == before


def test_what_is_missing_is_one_line_that_says_what_to_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(line: str, *words: str) -> None:
        with pytest.raises(SystemExit, match="2"):
            run(*words)
        assert line in capsys.readouterr().err.strip().splitlines()[-1]

    Path("empty").mkdir()
    fails("expected images in empty, found none", "empty")
    Path("empty/broken.png").write_bytes(b"no image")
    fails("got none of 1; see the reasons above", "empty")
    fails("expected a new or empty folder for the export, got empty", "new", "--export", "empty")
    assert [path.name for path in Path("empty").iterdir()] == ["broken.png"]
    clusters(3)
    fails("they belong to another encoder", "new")
    Path("artifacts/cluster/pixels/centroids.npy").unlink()
    fails("artifacts/cluster/pixels/centroids.npy, found none; run its cluster stage", "new")


def test_more_skipped_images_than_max_skipped_are_one_line_and_no_table(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("new/a.psd").write_bytes(b"x")
    with pytest.raises(SystemExit, match="2"):
        run("new", "--out", "table.csv", "--max-skipped", "0.19")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: expected at most 0.19 of the images to be skipped (data.max_skipped), got 1 of 5; see the reasons "
        "above, or give --max-skipped"
    )
    assert not Path("table.csv").exists()
    assert len(run("new", "--max-skipped", "0.2")) == 4


def test_nothing_is_written_into_the_folder_of_images(run: Run) -> None:
    def seen() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (Path("new"), *Path("new").rglob("*"))}

    before = seen()
    run("new", "--out", "table.csv", "--embeddings", "e.npy", "--export", "sorted")
    assert seen() == before


def test_every_image_that_is_left_out_is_named_and_counted(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.psd", "sub/b.dng", "notes.txt", "c.png"):
        Path("new", name).write_bytes(b"x")
    np.save("new/stack.npy", np.zeros((3, 8, 8), np.uint8))
    assert list(run("new")) == sorted(BRIGHTNESS)
    assert sorted(said) == [
        "4 images assigned, 4 skipped, 1 other files ignored",
        "skipped a.psd: Photoshop: convert it to PNG",
        "skipped c.png: not an image that can be read",
        "skipped stack.npy: NumPy stack beside image files: move it into a folder of its own",
        "skipped sub/b.dng: camera raw: develop it to TIFF or JPEG",
    ]


def test_one_file_is_treated_like_a_folder_of_one(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(run("new/sub/dark.png")) == ["dark.png"]
    assert said == ["1 images assigned, 0 skipped, 0 other files ignored"]
    for name, words in {"raw.nef": "camera raw: develop it", "notes.txt": "found none: 0 skipped and 1 other"}.items():
        Path("new", name).write_bytes(b"x")
        with pytest.raises(SystemExit, match="2"):
            run(f"new/{name}")
        assert words in capsys.readouterr().err


def test_names_stay_as_they_are_and_for_a_spreadsheet_none_is_a_formula(run: Run) -> None:
    names = ["=1+1.png", "@x.png", "a\nb\x1b[2J.png", "a\rb.png"]
    Path("odd").mkdir()
    for name in names:
        Image.new("L", (9, 9), 20).save(Path("odd", name))
    Path("odd/no\x1b[31m.png").write_bytes(b"")
    run("odd", "--out", "table.csv")
    with Path("table.csv").open(encoding="utf-8", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == names
    assert said[0].startswith(r"skipped no\x1b[31m.png: ")
    run("odd", "--out", "people.csv", "--spreadsheet")
    with Path("people.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["path"] for row in found] == ["'=1+1.png", "'@x.png", *names[2:]]
    assert all(float(row["distance"]) >= 0 for row in found)
