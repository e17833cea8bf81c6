"""Images on several threads, and in .npy files that may be larger than memory: writing them, statistics over them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepclust.errors import DataError
from deepclust.images import npy
from tasks.shared.operations.text import say
from tasks.shared.outputs import environment

_CHUNK_BYTES = 1 << 22
_REPORT_SECONDS = 10.0
_TRIED = 32  # images that tell how long one takes
# Seconds an image. Threads that take turns in Python lose more than they win on small files; they win on photographs,
# whose decoder needs no turn, and where a disk makes them wait.
_THREADS_PAY = 5e-4

Pixels = NDArray[np.uint8]
T = TypeVar("T")


def each(do: Callable[[int], T], indices: Sequence[int], *, step: int, what: str) -> Iterator[tuple[int, T | str]]:
    """Do something to each image, on several threads where that pays.

    Args:
        do: Gives something for image i, or raises DataError with the reason why it can not.
        indices: The images.
        step: So many go to a thread at once.
        what: A name for the lines of progress.

    Yields:
        Each index, in order, and what came of it: a string is the reason of a DataError.
    """

    def attempt(part: Sequence[int]) -> list[T | str]:
        results: list[T | str] = []
        for index in part:
            try:
                results.append(do(index))
            except DataError as error:
                results.append(str(error))
        return results

    seconds = []
    for index in indices[:_TRIED]:
        begin = time.perf_counter()
        (result,) = attempt([index])
        seconds.append(time.perf_counter() - begin)
        yield index, result
    indices = indices[_TRIED:]
    workers = environment.threads(at_once=1) if seconds and statistics.median(seconds) > _THREADS_PAY else 1
    due = time.monotonic() + _REPORT_SECONDS
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(indices), 4 * workers * step):  # so that few results wait at once
            some = indices[start : start + 4 * workers * step]
            parts = [some[begin : begin + step] for begin in range(0, len(some), step)]
            attempts = pool.map(attempt, parts) if workers > 1 else map(attempt, parts)
            for part, results in zip(parts, attempts, strict=True):
                yield from zip(part, results, strict=True)
            if time.monotonic() > due:
                say(f"{what}: {start + len(some)} of {len(indices)} images")
                due = time.monotonic() + _REPORT_SECONDS


def copy(
    sources: Sequence[Path],
    rows: NDArray[np.int64],
    target: Path,
    *,
    channels: int,
    heartbeat: Callable[[], None] = lambda: None,
) -> None:
    """Write some rows of the concatenation of files of (N, H, W, C) as another file.

    Args:
        sources: The files.
        rows: Numbers of the rows, sorted.
        target: The file to be.
        channels: So many of theirs.
        heartbeat: Called again and again.
    """
    parts = [np.load(source, mmap_mode="r", allow_pickle=False) for source in sources]
    begin, shape = 0, parts[0].shape[1:]
    step = chunk(shape)
    with npy.RowFile(target, (*shape[:2], channels), np.uint8) as file:
        for images in parts:
            low, high = np.searchsorted(rows, [begin, begin + len(images)])
            own = rows[low:high] - begin
            for start in range(0, len(own), step):
                file.append(images[own[start : start + step], ..., :channels])
                heartbeat()
            begin += len(images)


def mean_and_std(path: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in [0, 1], from exact counts of the 256 values."""
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    counts = np.zeros((images.shape[3], 256), np.int64)
    mode = "L" if images.shape[3] == 1 else "RGB"
    for part in _chunks(images):  # each as one tall picture: Pillow counts three times as fast as NumPy
        tall = Image.frombuffer(mode, (part.shape[2], part.shape[0] * part.shape[1]), part, "raw", mode, 0, 1)
        counts += np.reshape(tall.histogram(), counts.shape)
    values = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
    # Images are divided by the standard deviation, so it must not be zero.
    return [round(float(x), 6) for x in mean], [round(max(float(x), 1 / 255), 6) for x in std]


def chunk(shape: tuple[int, ...]) -> int:
    """How many items of this shape are held at once."""
    return max(1, _CHUNK_BYTES // max(1, int(np.prod(shape))))


def _chunks(array: Pixels) -> Iterator[Pixels]:
    step = chunk(array.shape[1:])
    for start in range(0, len(array), step):
        yield array[start : start + step]
