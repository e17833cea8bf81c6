"""The IDX format of MNIST and its kin: unsigned bytes, gzipped or not."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepclust.errors import DataError

_LIMIT = 1 << 28  # bytes; the largest file of this kind holds 47 MB, and a small one could unfold to anything


def read(path: Path, *, sha256: str | None = None) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes.

    Args:
        path: The file; `.gz` at its end means gzip.
        sha256: What the decompressed bytes must hash to.

    Returns:
        An array of the file's own shape: (N,) labels or (N, H, W) images.

    Raises:
        DataError: If the file is damaged: what was expected, and what came.
        FileNotFoundError: If there is no such file.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_LIMIT)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: expected gzip, got: {error}") from error
    if sha256:
        got = hashlib.sha256(content).hexdigest()
        if got != sha256:
            raise DataError(f"{path} is damaged: expected SHA-256 {sha256} of its decompressed bytes, got {got}")
    if content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path} is damaged: expected an IDX file of unsigned bytes, got the head {content[:4]!r}")
    dimensions = content[3]
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
    body = len(content) - 4 - 4 * dimensions
    if body != math.prod(shape):
        raise DataError(f"{path} is damaged: expected {math.prod(shape)} bytes for its shape {shape}, got {body}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
