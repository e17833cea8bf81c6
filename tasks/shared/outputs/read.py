"""Reading what a stage wrote: the only way to the files between the stages.

What is missing, damaged or of another kind is an error of one line, with the stage to run again.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from numpy.typing import DTypeLike, NDArray

from deepclust import files
from deepclust.errors import CheckpointError, DataError
from tasks.shared.operations.text import printable
from tasks.shared.outputs import layout

Check = Callable[[str], object]
"""Raises ValueError for what may not stand in a column."""


def array(
    path: Path, shape: tuple[int | None, ...], dtype: DTypeLike, *, finite: bool = False, mode: Literal["r", "c"] = "r"
) -> NDArray[Any]:
    """An array, memory-mapped; see `deepclust.files.array`. Raises: DataError."""
    with _remedied(path):
        return files.array(path, shape, dtype, finite=finite, mode=mode)


def record(path: Path, stated: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object with these keys; see `deepclust.files.record`. Raises: DataError."""
    with _remedied(path):
        return files.record(path, stated, optional)


def table(path: Path, columns: Mapping[str, Check], *, others: Check = str) -> list[dict[str, str]]:
    """All `rows` of a CSV file. Raises: DataError."""
    return list(rows(path, columns, others=others))


def rows(path: Path, columns: Mapping[str, Check], *, others: Check = str) -> Iterator[dict[str, str]]:
    """Rows of a CSV file, as text; only those that are asked for are read.

    Args:
        path: In UTF-8, with a header, and a line break at its end.
        columns: Those that it must have, and what checks their cells.
        others: What checks the cells of all other columns.

    Raises:
        DataError: If there is no such table.
    """
    with _remedied(path):
        try:
            with there(path).open("rb") as whole:
                whole.seek(-1, os.SEEK_END)
                if whole.read() != b"\n":
                    raise ValueError("its last line has no end")
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                names = list(reader.fieldnames or [])
                if absent := [name for name in columns if name not in names]:
                    raise CheckpointError(f"expected the columns {', '.join(absent)} in {path}, found none")
                checks = {name: columns.get(name, others) for name in names}
                for row in reader:
                    yield _checked(row, checks, path, reader.line_num)
        except (ValueError, OSError, csv.Error) as error:
            raise CheckpointError(f"expected a table in {path}, got a damaged file ({error})") from error


def _checked(row: dict[str, str], checks: Mapping[str, Check], path: Path, line: int) -> dict[str, str]:
    if len(row) != len(checks) or None in row.values():  # csv puts what is too much under None
        raise CheckpointError(f"expected {len(checks)} cells in line {line} of {path}, got more or fewer")
    for name, check in checks.items():
        try:
            check(row[name])
        except ValueError as error:
            raise CheckpointError(
                f"expected a number in column {name}, line {line} of {path}, got {row[name]!r:.80}"
            ) from error
    return row


def number(cell: str) -> None:
    """Refuse a cell that is neither blank nor a finite number. Raises: ValueError."""
    if cell and not math.isfinite(float(cell)):
        raise ValueError(cell)


def there(path: Path) -> Path:
    """The path of a file that is there. Raises: DataError."""
    if not path.is_file():
        raise damaged(path, f"expected a file {path}, found {'no regular one' if path.exists() else 'none'}")
    return path


def damaged(path: Path, what: str) -> DataError:
    """The error that a file is not as it should be, with the remedy."""
    repro = f"`dvc repro {layout.stage_of(path)}`"
    # DVC only looks again at a file that has changed since it was written, or is gone.
    remedy = f"remove it and run {repro}, after `python -m tasks.verify` if that restores the damage"
    return DataError(printable(f"{what}; {remedy if path.exists() else f'run {repro}'}"))


@contextmanager
def _remedied(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise damaged(path, str(error)) from error
