"""A stage by its command line, on two processes and on one; test_features.py has the files that several write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tasks.shared.outputs import layout
from tests.paths import ROOT


def test_two_processes_cluster_as_one_does(labelled: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("PET_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    ours = {"PYTHONPATH": str(ROOT), "DEEPCLUST_TRACKING": "off", "CUDA_VISIBLE_DEVICES": "", "PET_NPROC_PER_NODE": "2"}
    shutil.rmtree(layout.out("cluster", "pixels"))
    command = [sys.executable, "-m", "tasks.cluster", "pixels"]
    ran = subprocess.run(command, env=os.environ | ours, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
    centroids = layout.out("cluster", "pixels") / "centroids.npy"
    np.testing.assert_allclose(np.load(centroids), np.load(labelled / centroids), atol=1e-6)
