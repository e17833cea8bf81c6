"""Temporary folders of which a later run removes those that a killed one left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder(prefix: str, clear: Callable[[Path], None] = lambda _: None) -> Iterator[Path]:
    """A new folder that every user may enter, and that is removed at the end.

    Args:
        prefix: Of its name. Folders of this name that no living process holds are removed first.
        clear: Ends what still uses a folder before it is removed.
    """

    def remove(path: Path) -> None:
        clear(path)
        shutil.rmtree(path, ignore_errors=True)

    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if left.is_dir() and not left.is_symlink() and left.stat().st_uid == os.getuid():
            with (left / ".lock").open("a") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(left)
    path = Path(tempfile.mkdtemp(prefix=prefix))
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path.chmod(0o755)
        try:
            yield path
        finally:
            remove(path)
