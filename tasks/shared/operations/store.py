"""MLflow's store: its address, timeouts and errors. Does not import MLflow; see tracking.py."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepclust.errors import TrackingError
from tasks.shared.operations.text import masked, safe

SWITCH = "DEEPCLUST_TRACKING"


def enabled() -> bool:
    """Whether this process tracks: not where it is switched off, and only the first of several ranks."""
    return os.environ.get(SWITCH, "on").lower() not in ("off", "0", "false") and os.environ.get("RANK", "0") == "0"


def uri() -> str:
    """The store's address: `MLFLOW_TRACKING_URI`, else `mlflow.db` of the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def is_file() -> bool:
    """Whether the store is an SQLite file."""
    return uri().startswith("sqlite:")


@contextmanager
def impatient() -> Iterator[None]:
    """Let the first call fail in seconds, where MLflow's defaults wait for minutes. What the user set is kept."""
    first = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "4", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    later = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
    ours = [name for name in first if os.environ.get(name, later[name]) == later[name]]
    os.environ.update({name: first[name] for name in ours})
    try:
        yield
    finally:
        os.environ.update({name: later[name] for name in ours})


@contextmanager
def errors() -> Iterator[None]:
    """Turn what MLflow, SQLAlchemy and the network raise into a TrackingError of one line."""
    try:
        yield
    except Exception as error:
        # A full or read-only disk, which messages.py reports, is an OSError with a number; the network's have none.
        if not failed(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise TrackingError(
            f"expected a working MLflow store at {masked(uri())}, got: {line(error)}; start or mend it, change "
            f"MLFLOW_TRACKING_URI, or set {SWITCH}=off"
        ) from error


def failed(error: BaseException) -> bool:
    """Whether an error is the store's and not a bug of ours, by the name of the library that defines its class."""
    origin = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or origin in ("mlflow", "sqlalchemy", "sqlite3", "alembic", "requests", "urllib3")


def line(error: BaseException) -> str:
    """An error in one short line: the message of the OSError or SQLite error that caused it, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return safe(cause.strerror.lower())
        if isinstance(cause, sqlite3.Error):
            return safe(str(cause))
        cause = cause.__cause__ or cause.__context__
    # Masked before it is cut: half an address is not known as one.
    return safe(" ".join(str(error).split()))[:300] or type(error).__name__
