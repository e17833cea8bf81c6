"""An .npy file that grows by rows, for arrays larger than memory may be.

Not a memory-mapped file: on a full disk that ends the process with a signal, where a write raises OSError.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from numpy.typing import NDArray


class RowFile:
    """A context in which rows are appended to an .npy file; it can be read when the context is left.

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
        self._file = path.open("wb")

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
