"""An .npy file that grows by rows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from deepclust.images.npy import RowFile


@pytest.mark.parametrize("counts", [[], [0, 9, 1], [1] * 1200])
def test_the_file_is_what_numpy_would_have_saved(tmp_path: Path, counts: list[int]) -> None:
    # Rows that do not lie in order in memory are written in order all the same.
    parts = [np.random.default_rng(0).random((count, 3, 2)).astype(np.float32).mT for count in counts]
    with RowFile(tmp_path / "a.npy", (2, 3), np.float32) as rows:
        for part in parts:
            rows.append(part)
    expected = io.BytesIO()
    np.save(expected, np.concatenate([np.empty((0, 2, 3), np.float32), *parts]))
    assert (tmp_path / "a.npy").read_bytes() == expected.getvalue()
    assert rows.count == sum(counts)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only some systems have a device that is always full")
def test_a_full_disk_is_an_error_and_not_a_signal() -> None:
    with pytest.raises(OSError, match="No space left"), RowFile(Path("/dev/full"), (1 << 20,), np.uint8) as rows:
        rows.append(np.zeros((2, 1 << 20), np.uint8))
