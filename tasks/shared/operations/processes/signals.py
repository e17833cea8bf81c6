"""SIGTERM as an orderly exit, and which signals have come."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TERMINATED = 128 + signal.SIGTERM
came: list[int] = []  # the signals that were deferred (preemption.py)


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Exit on SIGTERM in a way that `finally` blocks see, unless another handler is set already."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
