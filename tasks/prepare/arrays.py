"""Images in one .npy file that may be larger than memory: writing it, and statistics over it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepclust.errors import DataError
from deepclust.images import npy
from tasks.shared.outputs import environment

_CHUNK_BYTES = 1 << 22
_REPORT_SECONDS = 10.0

Pixels = NDArray[np.uint8]


def write(
    path: Path, read: Callable[[int], Pixels], *, count: int, shape: tuple[int, int, int], what: str
) -> tuple[list[int], list[tuple[int, str]]]:
    """Read images on several threads and write them one after the other.

    Args:
        path: The .npy file to make.
        read: Gives image i as uint8 of the shape, or raises DataError with the reason why it can not be read.
        count: Number of images to read.
        shape: (H, W, C) of each.
        what: A name for the lines of progress.

    Returns:
        Indices of the images written, in order, and index and reason of those that could not be read.
    """

    def attempt(indices: range) -> list[Pixels | str]:
        results: list[Pixels | str] = []
        for index in indices:
            try:
                results.append(read(index))
            except DataError as error:
                results.append(str(error))
        return results

    kept: list[int] = []
    failed: list[tuple[int, str]] = []
    workers = environment.cores()
    step = _step(shape)
    due = time.monotonic() + _REPORT_SECONDS
    with npy.RowFile(path, shape, np.uint8) as target, ThreadPoolExecutor(workers) as pool:
        for start in range(0, count, 4 * workers * step):
            stop = min(count, start + 4 * workers * step)
            chunks = [range(begin, min(stop, begin + step)) for begin in range(start, stop, step)]
            for chunk, results in zip(chunks, pool.map(attempt, chunks), strict=True):
                for index, result in zip(chunk, results, strict=True):
                    if isinstance(result, str):
                        failed.append((index, result))
                    else:
                        target.append(result[None])
                        kept.append(index)
            if time.monotonic() > due:
                print(f"{what}: {stop} of {count} images", flush=True)
                due = time.monotonic() + _REPORT_SECONDS
    return kept, failed


def keep_first_channel(path: Path) -> None:
    """Turn (N, H, W, C) into (N, H, W, 1)."""
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    partial = path.with_name(f".{path.name}.partial")
    with npy.RowFile(partial, (*images.shape[1:3], 1), np.uint8) as target:
        for chunk in _chunks(images):
            target.append(chunk[..., :1])
    partial.replace(path)


def has_colour(path: Path) -> bool:
    """Whether any of the images, (N, H, W, 3), has unequal red, green and blue."""
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    return any(bool((chunk != chunk[..., :1]).any()) for chunk in _chunks(images))


def mean_and_std(path: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in [0, 1], from exact counts of the 256 values."""
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    counts = np.zeros((images.shape[3], 256), np.int64)
    for chunk in _chunks(images):
        for channel in range(images.shape[3]):
            counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
    # Images are divided by the standard deviation, so it must not be zero.
    return [round(float(x), 6) for x in mean], [round(max(float(x), 1 / 255), 6) for x in std]


def add_to_hash(sum_: hashlib._Hash, path: Path) -> None:
    """Add the type, shape and bytes of a .npy file's array, but not its header."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    sum_.update(repr((array.dtype.str, array.shape)).encode())
    for chunk in _chunks(array):
        sum_.update(np.ascontiguousarray(chunk).data)


def _step(shape: tuple[int, ...]) -> int:
    """Items of this shape in a chunk."""
    return max(1, _CHUNK_BYTES // max(1, int(np.prod(shape))))


def _chunks(array: Pixels) -> Iterator[Pixels]:
    step = _step(array.shape[1:])
    for start in range(0, len(array), step):
        yield array[start : start + step]
