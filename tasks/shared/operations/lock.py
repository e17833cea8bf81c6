"""A lock between the processes of a workspace."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.shared.outputs import layout


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock between the processes of this workspace; the kernel releases it if the process dies."""
    layout.STATE.mkdir(exist_ok=True)
    with (layout.STATE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
