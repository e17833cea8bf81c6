"""Time and memory of adapters that keep a bank, along a long stream; each in a process of its own, with one thread.

python benchmarks/bank.py --batches 10000

A bank of `filter_k` members a class must cost as much at the end of a stream as at its start: the ratio to the second
tenth (in the first the bank fills) stays near 1, and the peak of resident memory stops growing. Beside it, on a shorter
stream, `filter_k=None`, which keeps every image. The classifier is a small perceptron, so that the bank's share of the
time is seen; the images are patterns in noise, whose brightness and contrast drift, made batch by batch and not timed.
Time is the processor's, which other work on the machine disturbs less than the clock's. Linux only: memory is what
/proc says of the process.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import seeding
from deepclust.adaptation import ADAPTERS, Adapter, Classifier

SIZE, HIDDEN, DIM, CLASSES = 8, 128, 64, 10
BATCH = 64
TRAINING_STEPS = 200
PERIOD = 500  # batches of one drift there and back
NOISE = 1.2
PARTS = 10


@dataclass(frozen=True)
class Part:
    """What a tenth of the stream took.

    Attributes:
        milliseconds: Median of a batch, of processor time.
        members: In the bank at its end.
        growth: Bytes by which the peak of resident memory rose.
    """

    milliseconds: float
    members: int
    growth: int


def images(batches: int, *, drift: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (BATCH, 1, SIZE, SIZE) with their classes (BATCH,)."""
    patterns = torch.randn(CLASSES, 1, SIZE, SIZE, generator=seeding.generator("patterns"))
    generator = seeding.generator("stream", seed)
    for index in range(batches):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 1, SIZE, SIZE, generator=generator)
        shift = drift * math.sin(2 * math.pi * index / PERIOD)
        yield (patterns[labels] + NOISE * noise) * (1 + shift / 2) + shift, labels


def classifier() -> Classifier:
    """A perceptron with BatchNorm, trained on images that do not drift."""
    with seeding.seeded(0):
        featurizer = nn.Sequential(
            nn.Flatten(), nn.Linear(SIZE**2, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM)
        )
        model = Classifier(featurizer, nn.Linear(DIM, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch, labels in images(TRAINING_STEPS, drift=0.0, seed=0):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def count_members(adapter: Adapter) -> int:
    """Members in the bank, which in a state is what has labels."""
    (bank,) = (value for value in adapter.state_dict().values() if isinstance(value, dict) and "labels" in value)
    return len(bank["labels"])


def peak() -> int:
    """Bytes that were resident at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (found,) = (line for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(found.split()[1])


def _process(name: str, options: dict[str, Any], batches: int, found: multiprocessing.Queue[Part]) -> None:
    torch.set_num_threads(1)
    adapter = ADAPTERS[name](classifier(), ADAPTERS[name].config_class(**options))
    stream = images(batches, drift=0.5, seed=1)
    before = peak()
    for part in range(PARTS):
        seconds = []
        for _ in range(batches * part // PARTS, batches * (part + 1) // PARTS):
            batch, _ = next(stream)
            started = time.process_time()
            adapter(batch)
            seconds.append(time.process_time() - started)
        now = peak()
        found.put(Part(1e3 * statistics.median(seconds), count_members(adapter), now - before))
        before = now


def parts(name: str, options: dict[str, Any], batches: int) -> Iterator[Part]:
    """The tenths of a stream, as they are done.

    Raises:
        SystemExit: If the process failed.
    """
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[Part] = context.Queue()
    worker = context.Process(target=_process, args=(name, options, batches, found), daemon=True)
    worker.start()
    for _ in range(PARTS):
        while found.empty() and worker.is_alive():
            worker.join(0.2)
        if found.empty():
            raise SystemExit(f"error: {name} stopped with exit code {worker.exitcode}; its message is above")
        yield found.get()
    worker.join()


def main() -> None:
    """Print a markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--growing", type=int, default=1_000, help="batches with filter_k=None; 0 for none")
    parser.add_argument("--adapters", nargs="+", default=["tsd", "t3a"])
    arguments = parser.parse_args()
    banks = [name for name, adapter in ADAPTERS.items() if hasattr(adapter.config_class(), "filter_k")]
    for name in arguments.adapters:
        if name not in banks:
            raise SystemExit(f"error: expected adapters with a bank, {' or '.join(banks)}; got {name!r}")
    if arguments.batches < PARTS or 0 < arguments.growing < PARTS:
        raise SystemExit(f"error: expected at least {PARTS} batches, for a line each tenth")
    print("| adapter | filter_k | batches | ms a batch | to the second tenth | members | peak memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.adapters:
        for kept, options, batches in [
            ("default", {}, arguments.batches),
            ("None", {"filter_k": None}, arguments.growing),
        ]:
            if not batches:
                continue
            done = list(parts(name, options, batches))
            for index, part in enumerate(done):
                print(
                    f"| {name} | {kept} | {batches * index // PARTS:,} to {batches * (index + 1) // PARTS:,} "
                    f"| {part.milliseconds:.2f} | {part.milliseconds / done[1].milliseconds:.2f} "
                    f"| {part.members:,} | +{part.growth / (1 << 20):.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
