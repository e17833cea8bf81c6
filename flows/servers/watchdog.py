"""Ends a flow whose Prefect server is gone, or that is cancelled there.

Without its server, Prefect itself would try for minutes, and show tracebacks. The stages need no server and go on to
their end; only then is the process ended. A cancelled run stops its stages at once.
"""

from __future__ import annotations

import contextvars
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tasks.shared.operations.processes import dvc_runner
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.text import say

PATIENCE = 20.0  # seconds without an answer: a busy server may need some, and one that is started again too
_INTERNALS = ("prefect.events", "prefect.client", "prefect._internal")
_LOST = (
    "error: Prefect's server at {url} no longer answers, so this run's end could not be recorded there; the results of "
    "the stages that ended are kept; run again, which repeats none of them"
)

_ASK = 1.0  # seconds between two looks at the run's state

_running = threading.Event()


class CancelledRun(StageError):
    """The flow run was cancelled, or nobody is left who waits for it."""


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


@contextmanager
def cancellable() -> Iterator[None]:
    """End the body with `TerminationSignal` when its flow run is not to go on.

    That is when the run is cancelled or ended on the server, or, for a stage of another flow, when that one is: its
    run has ended, or it no longer holds the workspace's lock.

    Raises:
        CancelledRun: In place of the `TerminationSignal` that ended the body, if this is why.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    run_id, reasons = context.flow_run.id, list[str]()
    left, guard = threading.Event(), threading.Lock()  # no signal is sent after the body, whose run ends then

    def watch() -> None:
        held = dvc_runner.is_held()
        while not left.wait(_ASK):
            if reason := _why_not(run_id, held):
                with guard:
                    if not left.is_set():
                        reasons.append(reason)
                        os.kill(os.getpid(), signal.SIGTERM)  # in the main thread, Prefect raises TerminationSignal
                return

    thread = threading.Thread(target=contextvars.copy_context().run, args=(watch,), name="cancellation", daemon=True)
    thread.start()
    try:
        yield
        with guard:
            left.set()
    except TerminationSignal as signalled:
        # A worker on this machine may be faster, and sends the signal itself.
        if reason := reasons[0] if reasons else _why_not(run_id, held=False):
            raise CancelledRun(reason) from signalled
        raise
    finally:
        left.set()


def _why_not(run_id: UUID, held: bool) -> str:
    """Why a run is not to go on, empty if it is, or if the server does not say.

    Args:
        held: Whether the workspace's lock was held when the run began.
    """
    settings = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: 5})
    try:
        with settings, get_client(sync_client=True) as client:
            run = client.read_flow_run(run_id)
            if _ends(run):
                return "the run was cancelled"
            if run.parent_task_run_id is None:
                return ""
            if held and not dvc_runner.is_held():
                return "the flow of which this is a stage is gone"
            flow = client.read_task_run(run.parent_task_run_id).flow_run_id
            return "the flow of which this is a stage has ended" if flow and _ends(client.read_flow_run(flow)) else ""
    except ObjectNotFound:
        return "the run was deleted"
    except (httpx.HTTPError, RuntimeError):
        return ""


def _ends(run: FlowRun) -> bool:
    return run.state is not None and (run.state.is_final() or run.state.is_cancelling())


@contextmanager
def uninterrupted() -> Iterator[None]:
    """The body is not cut short by SIGTERM, which two may send: the worker, and `cancellable`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
