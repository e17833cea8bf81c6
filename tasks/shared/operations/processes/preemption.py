"""SIGTERM and SIGINT as a wish that can wait until a safe moment.

    with preemption.deferred() as told:
        for batch in batches:
            step(batch)
            if told():
                save()
                raise PreemptedError("…")

Decides when a run stops, never what it writes.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tasks.shared.operations.processes import worker

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_last: list[int] = []  # the signals that came in a deferred context


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Only take note of SIGTERM and SIGINT inside.

    A second one ends the process at once, unless torchrun started it: there both the supervisor and torchrun tell each
    process, so that two signals are one request, and torchrun kills after a time of grace anyway.

    Yields:
        A function that gives the number of the signal that came, or 0.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    came: list[int] = []
    _last.clear()

    def note(number: int, _: object) -> None:
        if came and not worker.is_worker():
            sys.exit(128 + number)
        came.append(number)
        _last.append(number)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def status() -> int:
    """The exit status of a preempted process: 130 after SIGINT, else 143, also if another process was told."""
    return 128 + (_last[0] if _last else signal.SIGTERM)
