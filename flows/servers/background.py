"""Processes in the background that outlive whoever starts them: Prefect's server, and the pools' workers."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.processes.supervisor import lives
from tasks.shared.outputs import layout

FOLDER = layout.STATE / "serve"


def start(name: str, command: Sequence[str], url: str, auth: str | None = None, **environment: str) -> str:
    """Start a command that outlives this process, unless it runs already for the same server; returns what was done.

    The process holds a lock on `<name>.pid` as long as it lives, so that the number of a dead one is never trusted. The
    file's other lines are the server's URL and a hash of its credential: a worker of another server would never see
    what this one schedules. The credential itself is passed in the environment: anyone can read a command line.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    FOLDER.chmod(0o700)  # the URL, and what Prefect logs, may hold a password
    of = [url, hashlib.sha256(auth.encode()).hexdigest() if auth else "none"]
    how = "started"
    if pid(name) is not None:
        if server_of(name) == of:
            return "was running"
        how = "restarted: it was another server's, or had another credential"
        end(name)
    if auth:
        environment["PREFECT_API_AUTH_STRING"] = auth
    with (FOLDER / f"{name}.pid").open("a+", encoding="utf-8") as file, log(name).open("ab") as output:
        if not _lock(file.fileno()):
            return "was running"
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, "PREFECT_API_URL": url},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=[file.fileno()],
        )
        os.fchmod(file.fileno(), 0o600)
        file.truncate(0)
        file.write("\n".join([str(process.pid), *of, ""]))
    return how


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def pid(name: str) -> int | None:
    """The process that was started in the background, if it lives."""
    path = FOLDER / f"{name}.pid"
    if not path.exists():
        return None
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        return None if _lock(file.fileno()) else int(file.readline() or 0) or None


def server_of(name: str) -> list[str]:
    """URL and hash of the credential of the server that the process in the background was started for."""
    path = FOLDER / f"{name}.pid"
    return path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []


def log(name: str) -> Path:
    """Where the process writes what it has to say."""
    return FOLDER / f"{name}.log"


def wait(ready: Callable[[], bool], name: str, seconds: float = 120) -> None:
    """Wait until what was started is ready.

    Raises:
        StageError: If it ends before, or takes longer.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if pid(name) is None or time.monotonic() > deadline:
            raise StageError(f"expected the {name} to come up; it did not; see {log(name)}")
        time.sleep(0.3)


def end(name: str) -> bool:
    """End a process in the background, with what it runs. False if it did not run."""
    number = pid(name)
    if number is None:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        # A worker waits for its runs, not always with success, and leaves them behind when it is killed.
        _stop(process.children(), patience=25)  # a stage has 15 seconds to save its state
        _stop([process], patience=10)
    return True


def _stop(processes: Sequence[psutil.Process], *, patience: float) -> None:
    """SIGTERM to all, SIGKILL to who is left after so many seconds."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal_)
        deadline = time.monotonic() + patience
        while any(map(lives, processes)) and time.monotonic() < deadline:
            time.sleep(0.2)
