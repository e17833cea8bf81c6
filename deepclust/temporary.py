"""Temporary folders: removed at the end, and by the next start where their process was killed.

A process holds a lock on its folder, which the kernel releases when the process dies. So a folder without a lock is a
dead process's, and no living one's is ever removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "deepclust-run-"


@contextmanager
def folder(parent: Path | None = None, *, prefix: str = PREFIX) -> Iterator[Path]:
    """A new folder that only its user may enter, after removing those of the same prefix that killed processes left.

    Args:
        parent: Where to make it, by default the system's temporary folder.
        prefix: How its name begins. Nothing else of this user's in `parent` may begin so.
    """
    parent = parent or Path(tempfile.gettempdir())
    _sweep(parent, prefix)
    path, lock = _make(parent, prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def everything() -> Iterator[Path]:
    """Such a folder, which holds all that this process and its children put into the temporary folder meanwhile."""
    with folder() as path:
        before = os.environ.get("TMPDIR"), tempfile.tempdir
        os.environ["TMPDIR"] = tempfile.tempdir = str(path)
        try:
            yield path
        finally:
            variable, tempfile.tempdir = before
            del os.environ["TMPDIR"]
            if variable is not None:
                os.environ["TMPDIR"] = variable


def _make(parent: Path, prefix: str) -> tuple[Path, int | None]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            lock = _lock(path)
        except (BlockingIOError, FileNotFoundError):  # another process's sweep came between
            continue
        except OSError:  # this file system locks no folders, so nobody removes one
            return path, None
        if path.exists():
            return path, lock
        os.close(lock)


def _sweep(parent: Path, prefix: str) -> None:
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for path in [Path(entry.path) for entry in entries if entry.name.startswith(prefix)]:
            with contextlib.suppress(OSError):
                lock = _lock(path)
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _lock(path: Path) -> int:
    """Lock a folder of this user's. Raises: OSError if it is none, such as a link, or a living process holds it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(f"{path} is another user's")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
