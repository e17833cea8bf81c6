"""The stage prepare on several processes: it writes what one does, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepclust import distributed
from deepclust.errors import DataError
from tasks.prepare import __main__ as prepare
from tasks.shared.operations import params
from tasks.shared.operations.params import overrides
from tests import processes
from tests.paths import ROOT
from tests.tasks import small_run


def _images(root: Path) -> None:
    """Images of several sizes and depths, pages, copies, damage, and colour in the last one alone."""
    root.mkdir()
    random = np.random.default_rng(0)
    for index in range(23):
        side = 20 + index
        Image.fromarray(random.integers(0, 256, (side, 24), np.uint8)).save(root / f"{index:02}.png")
    for index in (3, 19):
        (root / f"{index:02}-damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(index))
        deep = random.integers(0, 600 * index, (20, 20)).astype(np.uint16)
        Image.fromarray(deep).save(root / f"{index:02}-deep.png")
        pages = [Image.fromarray(random.integers(0, 256, (20, 20), np.uint8)) for _ in range(2)]
        pages[0].save(root / f"{index:02}-pages.tiff", save_all=True, append_images=pages[1:])
    whole = (root / "12.png").read_bytes()
    (root / "14-cut.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(root / "02.png", root / "20-copy.png")
    Image.new("RGB", (30, 30), "red").save(root / "22-red.png")


def _written(root: Path) -> dict[str, bytes]:
    folders = [root / "artifacts/prepare", root / "metrics"]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def _run(module: str, **variables: str) -> subprocess.CompletedProcess[str]:
    ours = {"PYTHONPATH": str(ROOT), "DEEPCLUST_TRACKING": "off", "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "TORCHELASTIC_"))}
    command = [sys.executable, "-m", module]
    return subprocess.run(command, env=environment | ours | variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    edits = [*small_run.SHORT, "data.max_skipped=0.2", "encoders=[pixels, swav]", "pretrain.swav.image_size=24"]
    overrides.apply(edits, tmp_path / "params.yaml")
    (tmp_path / "domains").mkdir()
    assert _run("tasks.sizes").returncode == 0
    return tmp_path


def test_two_processes_write_and_say_what_one_does(workspace: Path) -> None:
    _images(workspace / "images")
    alone = _run("tasks.prepare")
    assert (alone.returncode, alone.stderr) == (0, "")
    wanted = _written(workspace)
    meta = json.loads(wanted["artifacts/prepare/meta.json"])
    assert [item["path"] for item in meta["skipped"]] == ["03-damaged.png", "14-cut.png", "19-damaged.png"]
    assert meta["white"], "there are images of more than 8 bits"
    shutil.rmtree("artifacts/prepare")
    two = _run("tasks.prepare", PET_NPROC_PER_NODE="2")
    assert (two.returncode, two.stderr, two.stdout) == (0, "", alone.stdout)
    assert _written(workspace) == wanted


def test_a_bound_that_all_of_them_together_exceed_is_one_line_and_leaves_nothing(workspace: Path) -> None:
    _images(workspace / "images")
    overrides.apply(["data.max_skipped=0.05"], Path("params.yaml"))
    alone, two = _run("tasks.prepare"), _run("tasks.prepare", PET_NPROC_PER_NODE="2")
    assert (two.returncode, two.stderr) == (alone.returncode, alone.stderr)
    assert two.stderr.startswith("error: expected at most 0.05 of the files to be unreadable (data.max_skipped), got 3")
    assert two.stderr.count("\n") == 1
    assert not list(Path("artifacts").glob("*prepare*"))


def test_more_processes_than_images_prepare_a_stack(workspace: Path) -> None:
    Path("images").mkdir()
    random = np.random.default_rng(0)
    arrays = {f"{split}_images": random.integers(0, 256, (1, 16, 16, 3), np.uint8) for split in ("train", "test")}
    np.savez("images/stack.npz", **arrays)
    assert _run("tasks.prepare").returncode == 0
    wanted = _written(workspace)
    shutil.rmtree("artifacts/prepare")
    assert _run("tasks.prepare", PET_NPROC_PER_NODE="3").returncode == 0
    assert _written(workspace) == wanted


def _find(roots: list[Path]) -> str:
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    before = Path.cwd()
    os.chdir(roots[distributed.rank()])
    try:
        prepare.find_alike(params.load().data, 0)
    except DataError as error:
        return str(error)
    finally:
        os.chdir(before)
        del os.environ["TORCHELASTIC_RUN_ID"]
    return ""


def test_machines_that_see_other_images_are_told(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    _images(workspace / "images")
    other = tmp_path_factory.mktemp("other") / "workspace"
    shutil.copytree(workspace, other)
    assert processes.pool(2).run(_find, [workspace, other]) == ["", ""]
    (other / "images/00.png").unlink()
    found = processes.pool(2).run(_find, [workspace, other])
    assert all(line.startswith("expected all processes to find the same images in images, they do") for line in found)
