"""Time and memory of k-means, the graph of neighbours and embedding as the data grow, on one process and on two, each
with one thread.

python -m benchmarks.scale --rows 10000 100000 1000000 --images 10000 100000

Rows and images are memory maps in a temporary folder (TMPDIR says where; 512 bytes a row, 784 bytes and 512 of features
an image), made chunk by chunk. Linux only: memory is what /proc says of a process, sampled every few milliseconds,
above what it was before the work; the largest of the processes. Two kinds:

- own: anonymous memory, that nobody else can have. Embedding holds a batch, whatever N is. k-means holds a few numbers
  for each row of its share: in greedy k-means++ the distances to the candidates (2 + log k of them) and four more,
  later assignment and distance. Were the share loaded and not mapped, its 4 · D bytes a row would be added.
  The graph, which one process makes, holds the rows again to search them, and its indices and similarities.
- mapped: pages of the files, which the system takes back where it needs them; so they grow with the share, up to the
  memory that is free.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from deepclust import distributed, seeding
from deepclust.clustering import kmeans, neighbours
from deepclust.clustering.base import USUAL
from deepclust.models.encoder import Encoder
from tasks.embed import __main__ as embed

ITERATIONS, DIM, GROUPS = 20, 128, 150
SIZE, BATCH = 28, 256
CHUNK = 1 << 14  # rows made at once
MIB = 1 << 20


@dataclass(frozen=True)
class Cost:
    """What the work took on one process: seconds, and bytes above those before; `result` tells runs apart."""

    seconds: float
    own: int
    mapped: int
    result: float


def _resident() -> tuple[int, int]:
    """Bytes of anonymous memory and of mapped files that are in memory."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {name: value for name, _, value in (line.partition(":") for line in lines)}
    own, mapped = (1024 * int(found[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return own, mapped


def measured(work: Callable[[], float]) -> Cost:
    """Run the work while a thread watches the memory."""
    before = peak = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.003):
            now = _resident()
            peak = max(peak[0], now[0]), max(peak[1], now[1])

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return Cost(seconds, peak[0] - before[0], peak[1] - before[1], result)


def cluster(folder: Path, k: int) -> float:
    """k-means on this process's share of the rows, where they lie; gives the inertia."""
    rows = torch.from_numpy(np.load(folder / "rows.npy", mmap_mode="c"))
    mine = rows[distributed.share(len(rows))]
    return kmeans.fit(mine, k, seed=0, iterations=ITERATIONS, tolerance=0.0).inertia


def connect(folder: Path) -> float:
    """The graph of each row's nearest neighbours; gives the share of the true ones among them."""
    rows = torch.from_numpy(np.load(folder / "rows.npy", mmap_mode="c"))
    return neighbours.graph(rows, USUAL).recall


def embed_images(folder: Path) -> float:
    """Features of this process's share of the images into one file; gives the number of all images."""
    with seeding.seeded(0):
        encoder = Encoder(backbone="small", image_size=SIZE, channels=1, mean=[0.5], std=[0.25])
    encoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = np.load(folder / "images.npy", mmap_mode="r")
    return embed.embed(encoder, images, folder / "features.npy", batch_size=BATCH, device=torch.device("cpu"))


def _process(
    work: Callable[[Path], float], folder: Path, rank: int, count: int, port: int, found: multiprocessing.Queue[Cost]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with distributed.group(seconds=3600):
        distributed.all_sum(torch.zeros(1))  # a barrier
        found.put(measured(lambda: work(folder)))


def together(work: Callable[[Path], float], folder: Path, count: int) -> Cost:
    """The work on so many processes: the longest time and the most memory of any."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[Cost] = context.Queue()
    workers = [context.Process(target=_process, args=(work, folder, rank, count, port, found)) for rank in range(count)]
    for worker in workers:
        worker.start()
    costs = [found.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert len({cost.result for cost in costs}) == 1, "the processes disagree"
    return Cost(
        max(cost.seconds for cost in costs),
        max(cost.own for cost in costs),
        max(cost.mapped for cost in costs),
        costs[0].result,
    )


def make_rows(path: Path, count: int) -> None:
    """Rows of overlapping groups."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(GROUPS, DIM)).astype(np.float32)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, DIM))
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        noise = rng.normal(size=(size, DIM)).astype(np.float32)
        rows[start : start + size] = centres[rng.integers(0, GROUPS, size)] + noise


def make_images(path: Path, count: int) -> None:
    """Grey noise."""
    rng = np.random.default_rng(0)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, SIZE, SIZE, 1))
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        images[start : start + size] = rng.integers(0, 256, (size, SIZE, SIZE, 1), dtype=np.uint8)


def main() -> None:
    """Print a markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--images", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    print("| work | N | processes | seconds | own, MiB a process | mapped, MiB a process | result |")
    print("|---|---|---|---|---|---|---|")
    many = arguments.processes
    for name, work, make, file, counts, numbers in [
        (
            f"k-means, k {arguments.k}, {DIM} dimensions",
            functools.partial(cluster, k=arguments.k),
            make_rows,
            "rows.npy",
            arguments.rows,
            many,
        ),
        (f"{USUAL} neighbours, {DIM} dimensions", connect, make_rows, "rows.npy", arguments.rows, [1]),
        (f"embedding, {SIZE}×{SIZE}", embed_images, make_images, "images.npy", arguments.images, many),
    ]:
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder) / file, count)
                for processes in numbers:
                    cost = together(work, Path(folder), processes)
                    print(
                        f"| {name} | {count:,} | {processes} | {cost.seconds:.1f} | {cost.own / MIB:.0f} "
                        f"| {cost.mapped / MIB:.0f} | {cost.result:.10g} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
