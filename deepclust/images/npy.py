"""NumPy's files: what arrays one holds, and an .npy file that grows by rows, for arrays larger than memory may be."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib.format import (
    header_data_from_array_1_0,
    read_array_header_1_0,
    read_array_header_2_0,
    read_magic,
    write_array_header_1_0,
)
from numpy.typing import NDArray

from deepclust.errors import DataError

_BUFFER = 1 << 20  # bytes that are written at once


class Header(NamedTuple):
    """What is known of an array without its values.

    Attributes:
        shape: Of the array.
        dtype: Of its values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def headers(path: Path) -> dict[str, Header]:
    """The arrays of an .npz file by name, or the one of an .npy file under no name; no array is read.

    Raises:
        DataError: If it is damaged, or no such file.
    """
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return {"": _header(file)}
        found = {}
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        found[name.removesuffix(".npy")] = _header(file)
        return found
    except Exception as error:  # of many types
        raise DataError("a damaged NumPy file") from error


def _header(file: IO[bytes]) -> Header:
    version = read_magic(file)
    shape, _, dtype = (read_array_header_1_0 if version == (1, 0) else read_array_header_2_0)(file)
    return Header(shape, dtype)


def is_stack(path: Path) -> bool:
    """Whether a NumPy file may hold many pictures, as (N, H, W) or (N, H, W, C), or can not be read to tell."""
    try:
        return any(len(header.shape) in (3, 4) for header in headers(path).values())
    except DataError:
        return True


class RowFile:
    """A context in which rows are appended to an .npy file; it can be read when the context is left.

    Not a memory-mapped file: on a full disk that ends the process with a signal, where a write raises OSError.

    Args:
        path: The file to be.
        shape: Of one row.
        dtype: Of the values.

    Attributes:
        count: Rows written so far.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        self.count = 0
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb", buffering=_BUFFER)

    def __enter__(self) -> RowFile:
        self._head = self._write_header()
        return self

    def append(self, rows: NDArray[Any]) -> None:
        """Append (n, *shape)."""
        assert rows.shape[1:] == self._shape, (rows.shape, self._shape)
        assert rows.dtype == self._dtype, (rows.dtype, self._dtype)
        self._file.write(np.ascontiguousarray(rows).data)
        self.count += len(rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                head = self._write_header()
                assert head == self._head, "NumPy leaves room in the header for any number of rows"

    def _write_header(self) -> int:
        """Write the header for the rows so far; where it ends."""
        empty = np.empty((0, *self._shape), self._dtype)
        write_array_header_1_0(self._file, header_data_from_array_1_0(empty) | {"shape": (self.count, *self._shape)})
        return self._file.tell()
