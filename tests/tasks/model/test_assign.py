"""New images to clusters and classes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deepclust import bundle
from deepclust.models import encoder
from tasks.model import assign
from tests.paths import ROOT

PARAMS = ROOT / "params.yaml"
SIDE = 8
MEAN, STD = 0.5, 0.25
BRIGHTNESS = {"dark.png": 20, "sub/dark.png": 30, "sub/deep/light.png": 230, "middle.png": 128}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encoder that flattens the image, two clusters (dark and light) and no classifier."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS.read_text(encoding="utf-8"), encoding="utf-8")
    for stage in ("pretrain", "cluster", "linear"):
        (tmp_path / "artifacts" / stage / "pixels").mkdir(parents=True)
    pixels = encoder.Encoder(backbone="pixels", image_size=SIDE, channels=1, mean=[MEAN], std=[STD])
    encoder.save(pixels, tmp_path / "artifacts/pretrain/pixels")
    clusters(np.array([[-1.0] * SIDE**2, [1.0] * SIDE**2]), normalise=False)
    (tmp_path / "artifacts/prepare").mkdir()
    (tmp_path / "artifacts/prepare/statistics.json").write_text(json.dumps({"resize": "stretch"}))
    for name, value in BRIGHTNESS.items():
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 20), value).save(tmp_path / "new" / name)
    return tmp_path


def clusters(centroids: np.ndarray, *, normalise: bool) -> None:
    np.save("artifacts/cluster/pixels/centroids.npy", centroids.astype(np.float32))
    description = {"k": len(centroids), "normalise": normalise}
    Path("artifacts/cluster/pixels/cluster.json").write_text(json.dumps(description))


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["assign", "--encoder", "pixels", *words])
    assign.main()


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of error."""
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *words)
    assert caught.value.code == 2
    error: str = capsys.readouterr().err
    return error.strip().splitlines()[-1]


def rows(text: str) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in csv.DictReader(io.StringIO(text))}


def feature(value: int) -> np.ndarray:
    """By hand what the encoder makes of an image of one brightness."""
    return np.full(SIDE**2, (value / 255 - MEAN) / STD)


def test_each_image_goes_to_its_nearest_centroid(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "new")
    table = rows(capsys.readouterr().out)
    assert list(table) == sorted(BRIGHTNESS)
    for name, value in BRIGHTNESS.items():
        distances = [np.linalg.norm(feature(value) - centre) for centre in (-1, 1)]
        assert int(table[name]["cluster"]) == np.argmin(distances)
        assert float(table[name]["distance"]) == pytest.approx(min(distances), rel=1e-5)
        assert list(table[name]) == ["path", "cluster", "distance"]


def test_features_are_normalised_where_the_clusters_are(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ones = np.ones(SIDE**2) / SIDE
    clusters(np.array([-ones, ones]), normalise=True)
    run(monkeypatch, "new/dark.png")
    row = rows(capsys.readouterr().out)["dark.png"]
    assert row["cluster"] == "0"
    assert float(row["distance"]) == pytest.approx(0, abs=1e-6)


def test_grey_images_reach_a_larger_network_of_three_channels(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = encoder.Encoder(
        backbone="pixels",
        image_size=SIDE,
        channels=1,
        mean=[MEAN] * 3,
        std=[STD] * 3,
        network_channels=3,
        input_size=2 * SIDE,
    )
    encoder.save(wide, workspace / "artifacts/pretrain/pixels")
    dim = 3 * (2 * SIDE) ** 2
    clusters(np.array([[-1.0] * dim, [1.0] * dim]), normalise=False)
    run(monkeypatch, "new")
    for name, row in rows(capsys.readouterr().out).items():
        value = (BRIGHTNESS[name] / 255 - MEAN) / STD
        assert float(row["distance"]) == pytest.approx(min(abs(value + 1), abs(value - 1)) * np.sqrt(dim), rel=1e-5)


def test_a_classifier_adds_class_and_probability(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = np.stack([np.zeros(SIDE**2), np.full(SIDE**2, 0.01)]).astype(np.float32)
    tensors = {"weight": torch.from_numpy(weight), "bias": torch.tensor([0.0, 0.1])}
    save_file(tensors, "artifacts/linear/pixels/classifier.safetensors")
    Path("artifacts/linear/pixels/classifier.json").write_text(json.dumps({"classes": ["night", "day"]}))
    run(monkeypatch, "new")
    for name, row in rows(capsys.readouterr().out).items():
        score = 0.01 * feature(BRIGHTNESS[name]).sum() + 0.1
        day = 1 / (1 + np.exp(-score))
        assert row["class"] == ("day" if day > 0.5 else "night")
        assert float(row["probability"]) == pytest.approx(max(day, 1 - day), rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 3 * SIDE**2, 1 << 26])
def test_table_and_embeddings_have_the_same_rows_whatever_the_chunk(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chunk: int
) -> None:
    monkeypatch.setattr(assign, "_CHUNK_BYTES", chunk)
    Path("new/broken.png").write_bytes(b"no image")
    run(monkeypatch, "new", "--out", "out/table.csv", "--embeddings", "out/e.npy")
    table = rows(Path("out/table.csv").read_text(encoding="utf-8"))
    embeddings = np.load("out/e.npy", allow_pickle=False)
    assert embeddings.dtype == np.float32
    expected = np.stack([feature(BRIGHTNESS[name]) for name in table])
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)
    assert list(table) == sorted(BRIGHTNESS)
    assert sorted(path.name for path in Path("out").iterdir()) == ["e.npy", "table.csv"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "skipped broken.png: not an image that can be read",
        "4 images assigned, 1 skipped",
    ]


@pytest.mark.parametrize("how", ["--copy", "--link"])
def test_export_sorts_the_images_into_one_folder_a_cluster(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    Path("sorted").mkdir()
    run(monkeypatch, "new", "--out", "t.csv", "--export", "sorted", how)
    table = rows(Path("t.csv").read_text(encoding="utf-8"))
    files = {str(path.relative_to("sorted")): path for path in Path("sorted").rglob("*.png")}
    assert sorted(files) == sorted(f"cluster-0{row['cluster']}/{name}" for name, row in table.items())
    for name, path in files.items():
        assert path.is_symlink() == (how == "--link")
        assert path.read_bytes() == Path("new", name.split("/", 1)[1]).read_bytes()


def test_export_never_writes_into_a_folder_that_holds_something(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sorted").mkdir()
    Path("sorted/mine.txt").write_text("mine")
    assert "expected a new or empty folder for the export, got sorted" in fails(
        monkeypatch, capsys, "new", "--export", "sorted"
    )
    assert [path.name for path in Path("sorted").rglob("*")] == ["mine.txt"]


def test_a_failure_half_way_leaves_neither_table_nor_folder(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign, "_CHUNK_BYTES", 1)
    whole = bundle.Bundle.assign
    calls = []

    def second_fails(model: bundle.Bundle, images: np.ndarray, **options: int) -> Any:
        calls.append(images)
        if len(calls) == 2:
            raise RuntimeError("half way")
        return whole(model, images, **options)

    monkeypatch.setattr(bundle.Bundle, "assign", second_fails)
    before = sorted(Path().iterdir())
    with pytest.raises(RuntimeError, match="half way"):
        run(monkeypatch, "new", "--out", "t.csv", "--embeddings", "e.npy", "--export", "sorted")
    assert sorted(Path().iterdir()) == before


def test_what_is_missing_is_one_line_that_says_what_to_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected a folder of images at none" in fails(monkeypatch, capsys, "none")
    Path("empty").mkdir()
    assert "expected images in empty, found none" in fails(monkeypatch, capsys, "empty")
    Path("empty/broken.png").write_bytes(b"no image")
    assert "got none of 1; see the reasons above" in fails(monkeypatch, capsys, "empty")
    np.save("artifacts/cluster/pixels/centroids.npy", np.zeros((2, 3), np.float32))
    assert "they belong to another encoder" in fails(monkeypatch, capsys, "new")
    Path("artifacts/cluster/pixels/centroids.npy").unlink()
    assert "expected clusters in artifacts/cluster/pixels, found none; run its cluster stage" in fails(
        monkeypatch, capsys, "new"
    )
