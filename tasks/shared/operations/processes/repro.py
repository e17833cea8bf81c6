"""Runs one stage through DVC's Python API: its command line says only in sentences what came of the stage.

python repro.py STAGE run|force

A child process of the flow (dvc_runner.py), so that stopping it stops the stage. The exit status is one of `WHAT`, or 1
after a line that begins with `ERROR: `.

DVC takes a read-only file of its cache for whole (3.67.1, `LocalHashFileDB.check`), restores a damaged one without a
word, and keeps it when the stage runs again. Here each is hashed before it is used; a damaged one is removed, so that
DVC runs the stage and stores the file anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

WHAT = {0: "run", 10: "unchanged", 11: "restored"}
_ATTEMPTS = 60  # of getting the lock for files that another DVC process works on


def main(stage: str, *, force: bool) -> int:
    """Bring a stage up to date; the exit status."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError

    log = io.StringIO()  # DVC logs here when it starts the stage's command
    logging.getLogger("dvc.stage.run").addHandler(logging.StreamHandler(log))
    logging.getLogger("dvc.dvcfile").setLevel(logging.WARNING)
    attempts = 0
    while True:
        attempts += 1
        try:
            with patient() as repo, _alone(repo, stage):
                repo.scm_context.quiet = True
                _refuse_damaged(repo, stage)
                changed = repo.reproduce(stage, single_item=True, force=force)
        except DvcException as error:
            if isinstance(error.__cause__ or error, LockError) and attempts < _ATTEMPTS:
                time.sleep(1)
                continue
            print("ERROR:", in_one_line(error))
            return 1
        return 0 if log.getvalue() else 11 if changed else 10


def patient() -> Any:
    """The repository in the current folder; whoever asks for its lock waits as long as it takes."""
    from dvc import cli

    options = cli.parse_args(["--wait-for-lock", "repro"])  # the public way
    return options.func(options).repo


def drop_damaged(repo: Any) -> None:
    """Remove what is damaged of that which a repository's outputs need from its cache."""
    cache = repo.cache.local
    for out in repo.index.outs:
        if out.use_cache and out.hash_info:
            dropped = is_dropped(Path(cache.oid_to_path(out.hash_info.value)))
            for _, _, file in (not dropped and out.hash_info.isdir and out.get_obj()) or ():
                is_dropped(Path(cache.oid_to_path(file.value)))


@contextmanager
def _alone(repo: Any, stage: str) -> Iterator[None]:
    """Hold a lock for the stage, and release what a killed process has left of DVC's own.

    DVC takes an owner for alive if its number is that of any process, and in a container numbers are few.

    Raises:
        LockError: If another process runs the stage.
    """
    from dvc.lock import LockError
    from dvc.rwlock import _edit_rwlock

    with (Path(repo.tmp_dir) / f"{stage}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockError(f"expected to be the only one who runs {stage}, but another process does") from error
        hardlink = repo.config["core"].get("hardlink_lock", False)
        with repo.lock, _edit_rwlock(repo.tmp_dir, repo.fs, hardlink) as lock:
            for path, owners in list(lock["read"].items()):
                lock["read"][path] = [owner for owner in owners if not _runs(owner, stage)]
            for path, owner in list(lock["write"].items()):
                if _runs(owner, stage):
                    del lock["write"][path]
        yield


def _runs(owner: dict[str, Any], stage: str) -> bool:
    """Whether a holder of DVC's locks was this script, for the stage."""
    return Path(__file__).name in owner["cmd"] and owner["cmd"].split()[-2:-1] == [stage]


def _refuse_damaged(repo: Any, stage: str) -> None:
    """Make this repository's cache hash what it is asked for, once in this process."""
    from dvc.stage.cache import StageCache
    from dvc_data.hashfile.db.local import LocalHashFileDB
    from dvc_objects.errors import ObjectFormatError

    whole: set[tuple[str, int, int]] = set()

    def check(oid: str, check_hash: bool = True, _info: Any = None) -> Any:
        path = Path(cache.oid_to_path(oid))
        stat = path.stat()
        state = (oid, stat.st_ino, stat.st_mtime_ns)
        if state not in whole:
            if is_dropped(path):
                raise ObjectFormatError(f"{path} is damaged")
            whole.add(state)
        return LocalHashFileDB.check(cache, oid, check_hash, _info)

    class Runs(StageCache):  # type: ignore[misc]
        def _load_cache(self, key: str, value: str) -> Any:
            if is_dropped_run(Path(self._get_cache_path(key, value))):
                return None
            run = super()._load_cache(key, value)
            look(out.get("md5") for out in (run or {}).get("outs", []))
            return run

    def look(oids: Iterator[str | None]) -> None:
        """Check the lists of the folders' files now: DVC reads them before it asks."""
        for oid in filter(None, oids):
            with suppress(FileNotFoundError, ObjectFormatError):
                check(oid)

    cache = repo.cache.local
    cache.check = check
    repo.stage_cache = Runs(repo)
    with repo.lock:  # another process may be writing dvc.lock
        stages = repo.stage.collect(stage)
    look(out.hash_info.value for found in stages for out in found.outs if out.hash_info)


def is_dropped(path: Path) -> bool:
    """Whether a file of the cache was not what its name says, and is removed."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
    except FileNotFoundError:
        return False
    return found != (path.parent.name + path.name).removesuffix(".dir") and _drop(path)


def is_dropped_run(path: Path) -> bool:
    """Whether the record of a run was not what its name says, and is removed."""
    from dvc.stage.cache import _get_cache_hash
    from dvc.utils.serialize import load_yaml

    try:
        found = _get_cache_hash(load_yaml(path))
    except FileNotFoundError:
        return False
    except Exception:  # whatever a parser makes of damaged text
        found = None
    return found != path.name and _drop(path)


def _drop(path: Path) -> bool:
    path.unlink(missing_ok=True)
    print(f"warning: {os.path.relpath(path)} in DVC's cache was damaged and is removed; what needs it is made anew")
    return True


def in_one_line(error: BaseException) -> str:
    """An error's message and those of its causes."""
    causes = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    return " ".join(": ".join(str(cause) for cause in causes).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], force=sys.argv[2] == "force"))
