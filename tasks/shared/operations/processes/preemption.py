"""SIGTERM and SIGINT as a request that can wait until a safe moment.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tasks.shared.operations.processes import signals, worker


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Only note SIGTERM and SIGINT inside. For the main thread, as all handling of signals is.

    A second one ends the process at once, unless torchrun started it: there the supervisor and torchrun both tell each
    process, so that two signals are one request, and torchrun kills after a time of grace anyway.

    Yields:
        A function that returns the number of the signal that came, or 0.
    """
    signals.came.clear()

    def note(number: int, _: object) -> None:
        if signals.came and not worker.is_worker():
            sys.exit(128 + number)
        signals.came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: signals.came[0] if signals.came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def status() -> int:
    """The exit status of a preempted process: 130 after SIGINT, else 143, also if only another process was told."""
    return 128 + (signals.came[-1] if signals.came else signal.SIGTERM)
