"""A stage ends soon after the DVC that started it.

`dvc repro` that is killed leaves its stage at work, for which the next one would have to wait. So a stage watches DVC's
process, and sends itself SIGTERM when that is gone, unless it has been told to stop already: a second signal would
keep it from saving its state. Stages of the flow have a supervisor as well, which does not survive the flow.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time

import psutil

from tasks.shared.operations.text import warn

_STAGE = "DVC_STAGE"  # DVC sets it for a stage's command
_POLL = 0.5
_GRACE = 12.0  # seconds between SIGTERM and SIGKILL: the main thread may be inside a library, where it sees no signal


def end_with_dvc() -> None:
    """Watch DVC in a thread if it started this process. For the main thread, as all handling of signals is."""
    if _STAGE not in os.environ or not (dvc := _dvc()):
        return
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(dvc, signals), name="watches DVC", daemon=True).start()


def _dvc() -> psutil.Process | None:
    """The nearest ancestor that DVC did not start: DVC itself, or what has adopted this process if DVC is gone.

    There may be a shell between.
    """
    for ancestor in psutil.Process().parents():
        try:
            variables = ancestor.environ()
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:  # another user's, such as the system's first process
            return ancestor
        if variables and variables.get(_STAGE) != os.environ[_STAGE]:  # macOS shows an empty one of its shells
            return ancestor
    return None


def _watch(dvc: psutil.Process, signals: int) -> None:
    told = False
    while _lives(dvc):
        told |= _told(signals)
    if told or _told(signals):
        return
    with contextlib.suppress(OSError):  # the terminal may be gone too
        warn(f"DVC (process {dvc.pid}), which started this stage, is gone; stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _told(signals: int) -> bool:
    """Whether a signal to stop comes within the time of a poll."""
    ready, _, _ = select.select([signals], [], [], _POLL)
    return bool(ready) and not {signal.SIGTERM, signal.SIGINT}.isdisjoint(os.read(signals, 64))


def _lives(dvc: psutil.Process) -> bool:
    try:
        return dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE and not _adopts(dvc)
    except psutil.NoSuchProcess:
        return False


def _adopts(process: psutil.Process) -> bool:
    """Whether a process is one that adopts the children of the dead, and not DVC as the first of a container."""
    if process.pid != 1 and process.name() != "systemd":
        return False
    command = " ".join(process.cmdline())
    return "dvc" not in command and "python" not in command
