"""Stages by their command lines, on two processes and on one: the same results."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tasks.shared.outputs import layout
from tests.tasks import small_run


def _on_two(stage: str, root: Path) -> None:
    ours = {
        "PYTHONPATH": str(small_run.REPOSITORY),
        "DEEPCLUST_TRACKING": "off",
        "CUDA_VISIBLE_DEVICES": "",
        "PET_NPROC_PER_NODE": "2",
    }
    command = [sys.executable, "-m", f"tasks.{stage}", "pixels"]
    ran = subprocess.run(command, cwd=root, env=os.environ | ours, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, ""), f"{stage}: {ran.stderr}"


def test_two_processes_embed_and_cluster_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("PET_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    small_run.build(one)
    monkeypatch.chdir(one)
    small_run.run("prepare", monkeypatch)
    small_run.run("pretrain", monkeypatch, "pixels")
    shutil.copytree(one, two)
    for stage in ("embed", "cluster"):
        small_run.run(stage, monkeypatch, "pixels")
        _on_two(stage, two)
    for split in layout.SPLITS:
        path = layout.embeddings("pixels", split)
        assert (one / path).read_bytes() == (two / path).read_bytes()
    centroids = layout.out("cluster", "pixels") / "centroids.npy"
    np.testing.assert_allclose(np.load(one / centroids), np.load(two / centroids), atol=1e-6)
