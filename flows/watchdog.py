"""Ends a flow whose Prefect server is gone: Prefect itself would try for minutes, and show tracebacks.

The stages need no server and go on to their end; only then is the process ended.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tasks.shared.operations.text import say

PATIENCE = 20.0  # seconds without an answer: a busy server may need some, and one that is started again too
_INTERNALS = ("prefect.events", "prefect.client", "prefect._internal")
_LOST = (
    "error: Prefect's server at {url} no longer answers, so this run's end could not be recorded there; the results of "
    "the stages that ended are kept; run again, which repeats none of them"
)

_running = threading.Event()


@contextmanager
def stages_run() -> Iterator[None]:
    """The body runs stages, which are not to be cut short."""
    _running.set()
    try:
        yield
    finally:
        _running.clear()


@contextmanager
def watched(url: str, answers: Callable[[], bool]) -> Iterator[None]:
    """End this process with one line and status 1 if the server is gone and no stage runs.

    Args:
        url: The server's address, for the line.
        answers: Whether the server answers, within seconds.
    """
    left = threading.Event()

    def watch() -> None:
        last = time.monotonic()
        while not left.wait(1):
            if answers():
                last = time.monotonic()
            elif time.monotonic() - last > PATIENCE and not _running.is_set() and not left.is_set():
                say(_LOST.format(url=url), file=sys.stderr)
                os._exit(1)  # in order it would end only after Prefect's retries

    def worth_reading(record: logging.LogRecord) -> bool:
        about_server = record.name.startswith(_INTERNALS) or bool(record.exc_info)
        return record.levelno < logging.WARNING or not about_server or answers()

    handlers = [*logging.getLogger().handlers, *logging.getLogger("prefect._internal").handlers]
    for handler in handlers:
        handler.addFilter(worth_reading)
    # Else each batch of log lines that can not be delivered prints an error.
    reports, logging.raiseExceptions = logging.raiseExceptions, False
    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        left.set()
        for handler in handlers:
            handler.removeFilter(worth_reading)
        logging.raiseExceptions = reports
