"""A process of a stage: alone, or one of several that torchrun started for a launcher (launcher.py).

torchrun passes no exit status on, and restarts the group after any status but 0. So one of several processes that ends
on purpose, by a user's mistake or a preemption or because all is done, adds an outcome to a file of its launcher's and
exits with 0. Where several do, the main process's outcome counts before another's, and that before one that only says
that another process failed. An outcome of status 0 is the end of the whole work: nothing is done again after it.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

from deepclust.errors import DeepclustError, PeerError
from tasks.shared.operations.processes import signals
from tasks.shared.operations.text import say, show_traceback, warn
from tasks.shared.outputs import environment

FOLDER = "DEEPCLUST_LAUNCHER"  # path of the launcher's folder
LAUNCHER = "DEEPCLUST_LAUNCHER_PID"
_PARENT_DEATH_SIGNAL = 1  # prctl(2); Linux only


class Outcome(NamedTuple):
    """How one process ended on purpose.

    Attributes:
        order: 0 from the main process, 1 from another one, 2 if it only says that another process failed; the lowest
            counts.
        status: The launcher's exit status.
        line: What the launcher prints on stderr.
        told: Whether the process itself was told to stop by a signal.
    """

    order: int
    status: int
    line: str
    told: bool

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
    """Join the other processes for the body; only the main one writes to the terminal. Alone, do nothing."""
    if not is_worker():
        yield
        return
    if found := outcome():
        if not found.preempted:  # a process ended on purpose while torchrun was starting the group again
            sys.exit(0)
        _outcomes().unlink(missing_ok=True)  # a machine has come, and torchrun told the last group to stop for it
    _die_with_the_launcher()
    if is_main() and (count := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))):
        most = os.environ["TORCHELASTIC_MAX_RESTARTS"]
        warn(f"a process was lost; all start again ({count} of at most {most} times)")
    from deepclust import distributed

    try:
        with _silent_unless_main(), distributed.group(seconds=environment.collective_seconds()):
            yield
            if FOLDER in os.environ:
                with contextlib.suppress(OSError):  # it only saves a second attempt
                    _add_outcome(0, "")
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except SystemExit as stop:
        _leave(stop.code if isinstance(stop.code, int) else 1)
    except (DeepclustError, OSError):
        raise
    except Exception as error:
        if not _is_loss(error):
            show_traceback(type(error), error, error.__traceback__)
        elif _wait_for_outcome(seconds=2):
            _leave(0)
        else:
            warn(f"process {os.environ['RANK']} lost the others: {in_one_line(error)}")
        _leave(1)


@contextmanager
def together() -> Iterator[Callable[[], None]]:
    """Fail on all processes if the body fails on one; see `distributed.together`. Alone, do nothing."""
    if not is_worker():
        yield lambda: None
        return
    from deepclust import distributed

    with distributed.together(every=min(60, environment.collective_seconds() / 5)) as heartbeat:
        yield heartbeat


def note_begun() -> None:
    """Note that a run that begins anew has removed the state of earlier runs. Alone, do nothing."""
    if FOLDER in os.environ:
        (Path(os.environ[FOLDER]) / "begun").touch()


def has_begun() -> bool:
    """Whether `note_begun` was called before torchrun started the group again: then the state is this run's own."""
    return FOLDER in os.environ and (Path(os.environ[FOLDER]) / "begun").exists()


def end(status: int, line: str, error: BaseException) -> NoReturn:
    """End this process on purpose: alone with a line on stderr and a status, else with an outcome for the launcher."""
    if FOLDER in os.environ:
        _add_outcome(status, line, weak=isinstance(error, PeerError))
        _leave(0)
    say(line, file=sys.stderr)
    if is_worker():  # torchrun itself is the launcher
        _leave(status)
    sys.exit(status)


def outcome() -> Outcome | None:
    """The outcome that counts, the first of equal ones; None if no process has ended on purpose."""
    if FOLDER not in os.environ or not _outcomes().exists():
        return None
    lines = _outcomes().read_text(encoding="utf-8").splitlines(keepends=True)
    found = [Outcome(*json.loads(line)) for line in lines if line.endswith("\n")]
    return min(found, key=lambda one: one.order, default=None)


def _outcomes() -> Path:
    return Path(os.environ[FOLDER]) / "outcomes"


def _add_outcome(status: int, line: str, *, weak: bool = False) -> None:
    order = 2 if weak else 0 if is_main() else 1
    with _outcomes().open("a", encoding="utf-8") as file:
        file.write(json.dumps([order, status, line, bool(signals.came)]) + "\n")


def _wait_for_outcome(*, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not outcome():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _leave(status: int) -> NoReturn:
    """End this process at once: an interpreter that still belongs to a group may never end in order."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_loss(error: Exception) -> bool:
    """Whether an error says that another process does not answer. Gloo's errors have no class of their own."""
    return type(error).__module__ == "torch.distributed" or (isinstance(error, RuntimeError) and "gloo" in str(error))


def in_one_line(error: BaseException) -> str:
    """The first line of an error of torch, without its prefix in brackets."""
    return str(error).strip().partition("\n")[0].rpartition("] ")[2][:300] or type(error).__name__


@contextmanager
def _silent_unless_main() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if not is_main():
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def _die_with_the_launcher() -> None:
    """Let the kernel kill this process when the launcher dies: it would go on writing beside the next run."""
    launcher = int(os.environ.get(LAUNCHER) or os.getppid())
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:
            sys.exit(1)
