"""Child processes that never outlive this one, whatever ends it. See supervisor.py."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from deepclust.errors import StageError

GRACE = 15.0  # seconds between SIGTERM and SIGKILL: time to write a checkpoint
_SUPERVISOR = Path(__file__).with_name("supervisor.py")


class ChildProcesses:
    """The running children of one owner. Leaving the context ends them all.

    Args:
        grace: Seconds between SIGTERM and SIGKILL.
        hold: Descriptors that each supervisor keeps open as long as it lives, such as a locked file's.
    """

    def __init__(self, *, grace: float = GRACE, hold: Sequence[int] = ()) -> None:
        self._grace = grace
        self._hold = tuple(hold)
        self._guard = threading.Lock()
        self._running: dict[subprocess.Popen[bytes], int] = {}
        self._stopped = False

    def __enter__(self) -> ChildProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def stopped(self) -> bool:
        """Whether the children have been ended, and none can be started."""
        return self._stopped

    def start(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own.

        Its PATH begins with this interpreter's folder, so that `python` in a stage's command is this interpreter.

        Raises:
            StageError: If the children have been stopped.
        """
        with self._guard:
            if self._stopped:
                raise StageError(f"not started, because the run is being stopped: {' '.join(command)}")
            theirs, ours = os.pipe()
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", str(_SUPERVISOR), str(self._grace), *command],
                    stdin=theirs,
                    stdout=stdout,
                    stderr=stderr,
                    env=_environment(env or {}),
                    start_new_session=True,
                    pass_fds=self._hold,
                )
            except BaseException:
                os.close(ours)
                raise
            finally:
                os.close(theirs)
            self._running[process] = ours
            return process

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the end of a child and of all it started; its exit status."""
        status = process.wait()
        with self._guard:
            ours = self._running.pop(process, None)
        if ours is not None:
            os.close(ours)
            with contextlib.suppress(OSError):  # there is a group left only if the supervisor itself was killed
                os.killpg(process.pid, signal.SIGKILL)
        return status

    def stop(self) -> None:
        """End all children and wait until they are gone. None can be started afterwards."""
        with self._guard:
            self._stopped = True
            running = list(self._running)
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in running:
            try:
                process.wait(self._grace + 10)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
            self.wait(process)

    def run(self, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """Run a command to its end; exit status, stdout and stderr."""
        process = self.start(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, error = process.communicate()
        return self.wait(process), out.decode(errors="replace"), error.decode(errors="replace")

    def stream(
        self, command: Sequence[str], on_line: Callable[[str], None], *, env: Mapping[str, str] | None = None
    ) -> int:
        """Run a command to its end, with each line of its output passed on as it comes; its exit status.

        Of a progress bar, which rewrites its line after a carriage return, only the last state is passed on.
        """
        process = self.start(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert isinstance(process.stdout, io.BufferedReader)
        with io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="\n") as output:
            for line in output:
                if states := [state.rstrip() for state in line.split("\r") if state.strip()]:
                    on_line(states[-1])
        return self.wait(process)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PYTHONUNBUFFERED": "1", **extra, "PATH": path}
