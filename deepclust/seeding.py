"""Randomness from explicit seeds: nothing here or elsewhere in the library touches the global generator for good."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed from any parts, the same on every machine; different parts give unrelated seeds."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded from `parts`."""
    return torch.Generator().manual_seed(derive(*parts))


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block only, for module initialisers that accept no generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(*parts))
        yield
