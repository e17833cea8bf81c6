"""What a stage needs of the operating system: a lock between processes, and SIGTERM as an orderly exit."""

from __future__ import annotations

import fcntl
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tasks import layout

TERMINATED = 128 + signal.SIGTERM


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock that other processes of this workspace respect; the kernel frees it when its holder dies."""
    layout.STATE.mkdir(exist_ok=True)
    with (layout.STATE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """SIGTERM as an exit that `finally` blocks see, unless somebody else handles it already."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
