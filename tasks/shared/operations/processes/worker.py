"""A process of a stage: alone, or one of several that torchrun started for a launcher (launcher.py).

How one of several ends on purpose is an outcome, a status and a line in a file beside the launcher's others. More than
one process may leave one. The main process's counts before another's, and that before a peer's, which only says that
another one failed. Status 0 is the end of the whole work: whatever happens to a process from there on, nothing is done
again.

Decides where a stage runs and how it ends, never what it writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from deepclust.errors import DeepclustError, PeerError
from tasks.shared.outputs import environment

OUTCOME = "DEEPCLUST_OUTCOME"  # path of the files by which processes tell the launcher, without their suffix
_RANKS = (".main", ".other", ".peer")  # suffixes of the outcomes, the one that counts most first
_PARENT_DEATH_SIGNAL = 1  # prctl(2); Linux only


class Outcome(NamedTuple):
    """How the work of all ended.

    Attributes:
        status: The launcher's exit status.
        line: What it says on stderr.
        weak: Whether it only says that another process failed.
    """

    status: int
    line: str
    weak: bool

    @property
    def preempted(self) -> bool:
        """Whether the processes were told to stop."""
        return self.status > 128


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_main() -> bool:
    """Whether this is the process that writes files and speaks for all."""
    return not is_worker() or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[None]:
    """Work together with the other processes; only the main one writes to the terminal. Alone, do nothing."""
    if not is_worker():
        yield
        return
    if outcome():  # ended on purpose while torchrun was starting the group again
        sys.exit(0)
    _die_with_the_launcher()
    if is_main() and (count := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))):
        most = os.environ["TORCHELASTIC_MAX_RESTARTS"]
        print(f"warning: a process was lost; all start again ({count} of at most {most} times)", file=sys.stderr)
    _never_only_once()
    from deepclust import distributed

    try:
        with _silent_unless_main(), distributed.group(seconds=environment.collective_seconds()):
            yield
            _note_done()
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except SystemExit as stop:
        _leave(stop.code if isinstance(stop.code, int) else 1)
    except (DeepclustError, OSError):
        raise
    except Exception as error:
        if not _is_loss(error):
            sys.excepthook(*sys.exc_info())
        elif _wait_for_outcome(seconds=2):
            _leave(0)
        else:
            print(f"warning: process {os.environ['RANK']} lost the others: {in_one_line(error)}", file=sys.stderr)
        _leave(1)


def _note_done() -> None:
    if OUTCOME in os.environ:
        with contextlib.suppress(OSError):  # no more than a help
            _write(0, "")


def note_begun() -> None:
    """Take note that what a run that begins anew forgets is forgotten. Alone, do nothing."""
    if is_worker() and OUTCOME in os.environ:
        _begun().touch()


def _begun() -> Path:
    return Path(os.environ[OUTCOME]).with_suffix(".begun")


def _never_only_once() -> None:
    """A run that is to begin anew does so once: when torchrun starts it again, it goes on from what it saved since."""
    if OUTCOME in os.environ and _begun().exists():
        os.environ["DEEPCLUST_RESUME"] = "auto"


def _leave(status: int) -> NoReturn:
    """End this process; at once if it still belongs to a group, with which an interpreter can not end in peace."""
    from deepclust import distributed

    if distributed.processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextmanager
def together() -> Iterator[None]:
    """Fail on all processes if the body fails on one. Alone, do nothing."""
    if not is_worker():
        yield
        return
    from deepclust import distributed

    with distributed.together():
        yield


def end(status: int, line: str, error: BaseException) -> NoReturn:
    """End this process on purpose: alone with a line on stderr and a status, else with an outcome for the launcher."""
    if not is_worker():
        print(line, file=sys.stderr)
        sys.exit(status)
    if OUTCOME not in os.environ:  # torchrun itself is the launcher
        print(line, file=sys.stderr)
        _leave(status)
    _write(status, line, weak=isinstance(error, PeerError))
    _leave(0)


def _write(status: int, line: str, *, weak: bool = False) -> None:
    """Leave an outcome, whole; of equal rank, the first one stays."""
    suffix = ".peer" if weak else ".main" if is_main() else ".other"
    path = Path(os.environ[OUTCOME]).with_suffix(suffix)
    mine = path.with_name(f"{path.name}.{os.getpid()}")
    mine.write_text(json.dumps({"status": status, "line": line}), encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(mine, path)
    mine.unlink()


def outcome() -> Outcome | None:
    """The outcome that counts, or None if nobody ended on purpose."""
    if OUTCOME not in os.environ:
        return None
    for suffix in _RANKS:
        with contextlib.suppress(FileNotFoundError):
            text = Path(os.environ[OUTCOME]).with_suffix(suffix).read_text(encoding="utf-8")
            found: dict[str, Any] = json.loads(text)
            return Outcome(found["status"], found["line"], weak=suffix == ".peer")
    return None


def forget_preemption() -> None:
    """Remove the outcomes if they say that the processes were told to stop: it was for another group to begin."""
    found = outcome()
    if found and found.preempted:
        for suffix in _RANKS:
            Path(os.environ[OUTCOME]).with_suffix(suffix).unlink(missing_ok=True)


def _wait_for_outcome(*, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not outcome():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _is_loss(error: Exception) -> bool:
    """Whether an error says that another process does not answer. Gloo's have no class of their own."""
    return type(error).__module__ == "torch.distributed" or (isinstance(error, RuntimeError) and "gloo" in str(error))


def in_one_line(error: BaseException) -> str:
    """The first line of an error of torch's, without what stands before it in brackets."""
    return str(error).strip().partition("\n")[0].rpartition("] ")[2][:300] or type(error).__name__


@contextmanager
def _silent_unless_main() -> Iterator[None]:
    if is_main():
        yield
        return
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _die_with_the_launcher() -> None:
    """Ask the kernel for it: an orphan would go on writing beside the run that takes its place."""
    launcher = os.getppid()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:
            sys.exit(1)
