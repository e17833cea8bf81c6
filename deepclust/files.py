"""Arrays and descriptions in files: what is missing, damaged or of another kind is said in one sentence.

Callers add what to do. Nothing is unpickled.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from deepclust.config import check_fields
from deepclust.errors import CheckpointError, ConfigError

_CHECKED_AT_ONCE = 1 << 22  # values


def write_array(path: Path, values: NDArray[Any]) -> None:
    """Write a .npy file.

    NumPy's own `save` raises nothing where a full disk cuts an array of less than 4 KiB off (2.4.6): it does not look
    at what comes of the last write.

    Raises:
        OSError: If the disk does not take it whole.
    """
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    path.write_bytes(content.getbuffer())


def array(
    path: Path, shape: tuple[int | None, ...], dtype: DTypeLike, *, finite: bool = False, mode: Literal["r", "c"] = "r"
) -> NDArray[Any]:
    """An array, memory-mapped.

    Args:
        path: An .npy file.
        shape: Length of each axis; None: any.
        dtype: Of its values.
        finite: Whether NaN and infinity are refused; all values are read then.
        mode: `r`: not to be written to; `c`: changes stay in memory.

    Raises:
        CheckpointError: If there is no such array.
    """
    _is_there(path, "an array")
    try:
        found: NDArray[Any] = np.lib.format.open_memmap(path, mode=mode)
    except OSError:
        raise
    except Exception as error:  # NumPy raises many types on damaged files
        raise CheckpointError(f"expected an array in {path}, got a damaged file ({_line(error)})") from error
    if found.dtype != np.dtype(dtype) or not _fits(found.shape, shape):
        lengths = ", ".join("any" if length is None else str(length) for length in shape)
        raise CheckpointError(
            f"expected {np.dtype(dtype)} of shape ({lengths}{',' if len(shape) == 1 else ''}) in {path}, got "
            f"{found.dtype} of {found.shape}"
        )
    if finite:
        step = max(1, _CHECKED_AT_ONCE // max(1, int(np.prod(found.shape[1:]))))
        for start in range(0, len(found), step):
            whole = np.isfinite(found[start : start + step]).reshape(len(found[start : start + step]), -1).all(axis=1)
            if not whole.all():
                raise CheckpointError(
                    f"expected finite numbers in {path}, got NaN or infinity in row {start + int(whole.argmin())}"
                )
    return found


def record(path: Path, stated: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object.

    Args:
        path: A file in UTF-8.
        stated: The types of keys that it must have.
        optional: The types of keys that it may have; all others are not looked at.

    Raises:
        CheckpointError: If there is no such object.
    """
    _is_there(path, "a description")
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"expected JSON in {path}, got a damaged file ({_line(error)})") from error
    try:
        check_fields(value, stated, optional or {})
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return value


def _is_there(path: Path, what: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"expected {what} in {path}, found {'no regular file' if path.exists() else 'none'}")


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    lengths = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(length in (None, own) for own, length in lengths)


def _not_finite(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
