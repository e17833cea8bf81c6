"""MLflow's store: its address, timeouts and errors. Does not import MLflow; see tracking.py."""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from deepclust.errors import TrackingError
from tasks.shared.operations.text import safe

SWITCH = "DEEPCLUST_TRACKING"
_HTTP = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # while a run goes on
_MOST_SECONDS = 300  # several processes may wait for one that makes the tables of a new file
_REFUSED = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS")
_TIMEOUTS = ("ReadTimeout", "ConnectTimeout", "ReadTimeoutError", "ConnectTimeoutError", "TimeoutError")

Result = TypeVar("Result")


def enabled() -> bool:
    """Whether this process tracks: not where it is switched off, and only the first of several ranks."""
    return os.environ.get(SWITCH, "on").lower() not in ("off", "0", "false") and os.environ.get("RANK", "0") == "0"


def uri() -> str:
    """The store's address: `MLFLOW_TRACKING_URI`, else `mlflow.db` of the workspace"""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{os.path.realpath('mlflow.db')}"


def is_file() -> bool:
    """Whether the store is an SQLite file."""
    return uri().startswith("sqlite:")


def place() -> str:
    """The address as it may be shown: without a password."""
    return safe(uri())


def check_file() -> None:
    """Refuse an SQLite file that can not be written, in seconds; MLflow tries folders, junk and locks for minutes.

    Raises:
        sqlite3.Error: If it is a folder, no database, read-only, or locked for five seconds.
    """
    path = Path(uri().removeprefix("sqlite:///").partition("?")[0])
    if os.path.lexists(path):  # a link may lead to a file that MLflow is to make, or to itself
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rwc", uri=True, timeout=5)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()


@contextmanager
def http(*, seconds: int, retries: int) -> Iterator[None]:
    """Time-out and retries of MLflow's requests inside; its own would wait for minutes. What the user set is kept."""
    inside = dict(zip(_HTTP, (str(seconds), str(retries)), strict=True))
    ours = [name for name in _HTTP if os.environ.get(name, _HTTP[name]) == _HTTP[name]]
    os.environ.update({name: inside[name] for name in ours})
    try:
        yield
    finally:
        os.environ.update({name: _HTTP[name] for name in ours})


def impatient() -> AbstractContextManager[None]:
    """For the first calls, which decide whether a run can begin."""
    return http(seconds=4, retries=1)


def interruptible(call: Callable[[], Result]) -> Result:
    """Call in another thread, so that signals are obeyed meanwhile: a call that waits for SQLite's lock notes none.

    Raises:
        TrackingError: After five minutes without a result.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="tracking-begin", daemon=True).start()
    if wait([future], _MOST_SECONDS).not_done:
        raise TrackingError(_expected(f"no answer within {_MOST_SECONDS} s"))
    return future.result()


@contextmanager
def errors() -> Iterator[None]:
    """Turn what MLflow, SQLAlchemy and the network raise into a TrackingError of one line."""
    try:
        yield
    except Exception as error:
        # A full or read-only disk, which messages.py reports, is an OSError with a number; the network's have none.
        if not failed(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise TrackingError(_schema(error) or _expected(line(error))) from error


def _schema(error: Exception) -> str:
    """What to do about a store of another version of MLflow, empty if it is not that."""
    found = re.search(r"database schema \(found version (\w+), but expected (\w+)\)", str(error))
    if not found:
        return ""
    spec = find_spec("mlflow")
    assert spec
    assert spec.submodule_search_locations
    versions = Path(next(iter(spec.submodule_search_locations))) / "store/db_migrations/versions"
    older = found[1] == "None" or any(versions.glob(f"{found[1]}_*.py"))
    got, remedy = f"a newer one ({found[1]})", "use the MLflow that wrote it, or another store: MLFLOW_TRACKING_URI"
    if older:
        got, remedy = f"an older one ({found[1]})", f"back it up, then bring it up to date: mlflow db upgrade {place()}"
    return f"expected the MLflow store at {place()} to have this MLflow's schema ({found[2]}), got {got}; {remedy}"


def _expected(got: str) -> str:
    return (
        f"expected a working MLflow store at {place()}, got: {got}; start or mend it, change MLFLOW_TRACKING_URI, or "
        f"set {SWITCH}=off"
    )


def failed(error: BaseException) -> bool:
    """Whether an error is the store's and not a bug of ours, by the name of the library that defines its class.

    A module that is missing is the driver of a database.
    """
    origin = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, ModuleNotFoundError)) or origin in (
        "mlflow",
        "sqlalchemy",
        "sqlite3",
        "alembic",
        "requests",
        "urllib3",
    )


def lost(error: BaseException) -> bool:
    """Whether the store may take the same later, as after a lost connection; else it or a bug of ours refuses it."""
    refused = isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in _REFUSED
    return failed(error) and not refused


def line(error: BaseException) -> str:
    """An error in one short line, of what caused it: a time-out, or the message of an OSError or of SQLite."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in _TIMEOUTS:
            return "no answer in time"
        if isinstance(cause, OSError) and cause.strerror:
            return safe(cause.strerror.lower())
        if isinstance(cause, sqlite3.Error):
            return safe(str(cause))
        cause = cause.__cause__ or cause.__context__
    # Masked before it is cut: half an address is not known as one.
    return safe(" ".join(str(error).split()))[:300] or type(error).__name__
