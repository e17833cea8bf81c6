"""Arrays and tensors on disks that do not take them whole."""

from __future__ import annotations

import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust import files
from deepclust.models import weights
from tests.paths import ROOT


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can have more than 200 bytes in the body: pytest's own output may be a file too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_array(path, np.zeros(100, np.int64)),
        lambda path: files.write_array(path, np.zeros((100, 100), np.float32)),
        lambda path: weights.save({"rows": torch.zeros(100)}, path),
    ],
)
def test_a_full_disk_is_an_error_of_the_operating_system(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with full_disk(), pytest.raises(OSError, match="File too large") as caught:
        write(tmp_path / "file")
    assert caught.value.errno


def test_an_array_is_written_as_numpy_writes_it(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.save(tmp_path / "numpy.npy", values)
    files.write_array(tmp_path / "ours.npy", values)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_no_array_is_written_by_numpy_itself_which_does_not_see_a_full_disk() -> None:
    for file in [*(ROOT / "deepclust").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]:
        if file != ROOT / "deepclust/files.py":
            assert not re.search(r"\bnp\.save\w*\(|\.tofile\(", file.read_text(encoding="utf-8")), file
