"""Tensors on disks that do not take them."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch

from deepclust.models import weights


def test_a_full_disk_is_an_error_of_the_operating_system(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            weights.save({"rows": torch.zeros(1000)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno is not None
