"""What a process needs beside others: a lock between them; and SIGTERM as an orderly exit, from `environment`."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from tasks import layout
from tasks.environment import TERMINATED as TERMINATED
from tasks.environment import sigterm_exits as sigterm_exits


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock that other processes of this workspace respect; the kernel frees it when its holder dies."""
    layout.STATE.mkdir(exist_ok=True)
    with (layout.STATE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
