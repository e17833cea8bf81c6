"""Throughput of the small net: one process with two threads against two processes with one.

python benchmarks/threads.py
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.synchronize import Barrier

import torch

from deepclust.models import backbones

BATCH, STEPS, SIZE = 512, 12, 28


def images_per_second(threads: int, together: Barrier | None = None) -> float:
    """Median over steps of a forward and backward pass at 28×28."""
    torch.set_num_threads(threads)
    net, _ = backbones.build("small", channels=1, image_size=SIZE)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(BATCH, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    if together:
        together.wait()
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        net(images).square().sum().backward()
        seconds.append(time.perf_counter() - started)
    return BATCH / sorted(seconds)[STEPS // 2]


def _alone(threads: int, together: Barrier | None, found: multiprocessing.Queue[float]) -> None:
    found.put(images_per_second(threads, together))


def total(processes: int, threads: int) -> float:
    """Images a second of several processes that run at the same time."""
    context = multiprocessing.get_context("spawn")
    together, found = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=_alone, args=(threads, together, found)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    rates = [found.get() for _ in workers]
    for worker in workers:
        worker.join()
    return sum(rates)


def main() -> None:
    """Print both, alternating, five times."""
    for _ in range(5):
        one, two = total(1, 2), total(2, 1)
        print(f"1 process x 2 threads: {one:.0f} images/s; 2 processes x 1 thread: {two:.0f}; ratio {two / one:.2f}")


if __name__ == "__main__":
    main()
