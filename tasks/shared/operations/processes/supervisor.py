"""Runs a command, and ends everything that it started as soon as the pipe on standard input is closed.

    python supervisor.py GRACE_SECONDS COMMAND [ARGUMENT …]

The parent keeps the other end of the pipe open. If it is killed, even by SIGKILL, the pipe closes, and nothing is left
behind. SIGTERM, SIGINT and SIGHUP have the same effect. A SIGTERM ends DVC but not the stage that it runs, and torchrun
puts its workers into sessions of their own, so the signal goes to all descendants and members of the process group.

Runs as a script with few imports, because there is one such process for every running stage.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import psutil

_SET_CHILD_SUBREAPER = 36  # prctl(2); Linux only


def _in_our_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == os.getpgrp()
    except OSError:
        return False


def _family() -> set[psutil.Process]:
    """Everything that descends from this process or shares its group, but not itself."""
    me = psutil.Process()
    group = {process for process in psutil.process_iter() if _in_our_group(process.pid)}
    return group.union(me.children(recursive=True)) - {me}


def lives(process: psutil.Process) -> bool:
    """Whether a process is there and has not ended: a zombie has."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _end(grace: float) -> None:
    """SIGTERM to the family, SIGKILL to who is left after the grace period."""
    seen = _family()
    told = {process for process in seen if _in_our_group(process.pid)}
    deadline = time.monotonic() + grace
    # To the whole group at once: a shell whose command ends first would go on to its next line.
    os.killpg(os.getpgrp(), signal.SIGTERM)
    while living := {process for process in seen | _family() if lives(process)}:
        if time.monotonic() < deadline:
            _send(living - told, signal.SIGTERM)
        else:
            _send(living, signal.SIGSTOP)
            _send(living, signal.SIGKILL)
        told |= living
        seen |= living
        time.sleep(0.05)


def _send(processes: set[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def main() -> int:
    """Run the command; its exit status, or 128 + signal."""
    grace, command = float(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":  # orphaned descendants become children of this process
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None:
        ready, _, _ = select.select([0, wake], [], [])
        if 0 in ready or (wake in ready and set(os.read(wake, 64)) - {signal.SIGCHLD}):
            break
    ended_by_us = child.poll() is None
    _end(grace)
    status = child.wait()
    if ended_by_us:
        return 128 + signal.SIGTERM
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
