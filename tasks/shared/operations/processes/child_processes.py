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
from tasks.shared.operations.processes import supervisor

GRACE = 15.0  # seconds between SIGTERM and SIGKILL: time to write a checkpoint


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
        self._running: list[subprocess.Popen[bytes]] = []
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
        hold: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own. Its supervisor keeps the descriptors `hold` open too.

        Its PATH begins with this interpreter's folder, so that `python` in a stage's command is this interpreter.

        Raises:
            StageError: If the children have been stopped.
        """
        with self._guard:
            if self._stopped:
                raise StageError("not started, because the run is being stopped")
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
            process = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, str(self._grace), *command],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {}), "PATH": path},
                start_new_session=True,
                pass_fds=(*self._hold, *hold),
            )
            self._running.append(process)
            return process

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the end of a child and of all it started; its exit status."""
        status = process.wait()
        with self._guard:
            if process not in self._running:
                return status
            self._running.remove(process)
        assert process.stdin
        process.stdin.close()
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

    def stream(
        self,
        command: Sequence[str],
        on_line: Callable[[str], None],
        *,
        env: Mapping[str, str] | None = None,
        hold: Sequence[int] = (),
    ) -> int:
        """Run a command to its end, with each line of its output passed on as it comes; its exit status.

        Of a progress bar, which rewrites its line after a carriage return, only the last state is passed on.
        """
        process = self.start(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, hold=hold)
        assert isinstance(process.stdout, io.BufferedReader)
        with io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="\n") as output:
            for line in output:
                if states := [state.rstrip() for state in line.split("\r") if state.strip()]:
                    on_line(states[-1])
        return self.wait(process)
