"""The images that each process of the stage takes, and what the others found. One process alone loads no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tasks.shared.operations.processes import launcher

T = TypeVar("T")


def processes() -> int:
    """Number of processes of the stage."""
    return int(os.environ["WORLD_SIZE"]) if launcher.is_worker() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ["RANK"]) if launcher.is_worker() else 0


def mine(count: int) -> range:
    """The numbers, of `count`, that are this process's own: consecutive ones."""
    if not launcher.is_worker():
        return range(count)
    from deepclust import distributed

    return range(count)[distributed.share(count)]


def gathered(own: Sequence[T], parse: Callable[[Any], T]) -> Sequence[T]:
    """What the processes found, in their order, on the main one; on the others what they found themselves.

    Args:
        own: Values that JSON can hold.
        parse: Makes one of them of its JSON again.
    """
    if not launcher.is_worker():
        return own
    parts = _all(own)
    return [parse(value) for part in parts for value in json.loads(part)] if launcher.is_main() else own


def of_main(value: Any) -> Any:
    """The main process's value, as JSON makes it; alone as it is."""
    return json.loads(_all(value)[0]) if launcher.is_worker() else value


def equal(value: Any) -> bool:
    """Whether all processes have the same value."""
    return not launcher.is_worker() or len(set(_all(value))) == 1


def _all(value: Any) -> list[bytes]:
    """Each process's value as JSON: nothing that another machine sends is unpickled."""
    from deepclust import distributed

    return distributed.gather_bytes(json.dumps(value).encode())
