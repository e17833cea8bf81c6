"""Randomness from explicit seeds: the library leaves the global generators as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


def derive(*parts: int | str) -> int:
    """A 63-bit seed from any parts, the same on every machine; different parts give unrelated seeds."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded from `parts`."""
    return torch.Generator().manual_seed(derive(*parts))


@dataclass(frozen=True)
class Part:
    """The randomness of some rows of a batch, drawn for the whole of it: who computes which rows does not matter.

    Attributes:
        generator: CPU generator, at the same state wherever a part of the batch is computed.
        rows: Places of the rows in the batch.
        count: Rows of the batch.
    """

    generator: torch.Generator
    rows: Tensor
    count: int


def uniform(batch: int, *shape: int, low: float = 0.0, high: float = 1.0, generator: torch.Generator | Part) -> Tensor:
    """Uniform numbers (batch, *shape) on the CPU."""
    if isinstance(generator, Part):
        assert len(generator.rows) == batch, f"{batch} rows, but the part has {len(generator.rows)}"
        whole = torch.empty(generator.count, *shape).uniform_(low, high, generator=generator.generator)
        return whole[generator.rows]
    return torch.empty(batch, *shape).uniform_(low, high, generator=generator)


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch's global generators (CPU, current GPU) inside the block only, for modules that accept no generator."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(*parts))
        yield
