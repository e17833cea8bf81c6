"""The IDX format of MNIST and its kin: unsigned bytes, gzipped or not."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepclust.errors import DataError

_LIMIT = 1 << 28  # bytes; the largest file of this kind holds 47 MB, and a small one could decompress to any size


def read(path: Path, *, sha256: str | None = None) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes.

    Args:
        path: The file; `.gz` at its end means gzip.
        sha256: What the decompressed bytes must hash to. None: the file itself was checked before.

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
    if sha256 and (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{path} is damaged: expected SHA-256 {sha256} of its decompressed bytes, got {got}")
    # torchvision's `read_image_file` would read a file once more, after its check, and uncompressed ones only.
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
