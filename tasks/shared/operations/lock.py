"""Locks between the processes of a workspace, which the kernel releases when their process dies."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepclust.errors import StageError
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout

# Seconds of waiting that are not worth a line: for what may be refused in the end, for what only takes a moment.
_SILENT = 1.0, 10.0
_POLL = 0.1


@contextmanager
def locked(name: str, *, seconds: float = math.inf) -> Iterator[None]:
    """Hold a lock between the processes of this workspace. Who waits for long says for whom.

    Args:
        name: What the lock is for, such as `pretrain@swav`.
        seconds: How long to wait for the process that holds it.

    Raises:
        StageError: If another process still holds it then, or the file system has no locks.
    """
    layout.STATE.mkdir(exist_ok=True)
    path = layout.STATE / f"{name}.lock"
    with path.open("a+b", buffering=0) as file:
        _acquire(file.fileno(), path, name, seconds)
        with contextlib.suppress(OSError):  # on a full disk nobody can be told who holds it
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {platform.node()}, since {since}".encode())
        yield


def _acquire(descriptor: int, path: Path, name: str, seconds: float) -> None:
    begin, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - begin
        except OSError as error:
            raise StageError(
                f"expected a file system that can lock {path}, got: {error.strerror}; mount it with locks"
            ) from error
        if waited >= seconds:
            raise StageError(
                f"expected to be the only one at {name}, but another holds {path} ({_holder(path)}); wait for it or "
                "stop it, and run again"
            )
        if waited > _SILENT[math.isinf(seconds)] and not said:
            say(f"{name} waits for another that is at work ({_holder(path)})", file=sys.stderr)
            said = True
        time.sleep(_POLL)


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace") or "unknown process"
    return "unknown process"
