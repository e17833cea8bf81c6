"""Runs a command, and ends everything that it started as soon as the pipe on standard input is closed.

    python supervisor.py GRACE_SECONDS COMMAND [ARGUMENT …]

The parent keeps the other end of the pipe open. If it is killed, even by SIGKILL, the pipe closes: nothing is left
behind. SIGTERM, SIGINT and SIGHUP do the same. DVC dies of a SIGTERM and leaves its stage running, and torchrun puts
its workers into sessions of their own, so the whole family is sought: descendants and members of the process group.

Runs as a script, with next to no imports: one such process stands beside every stage.
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


def _family() -> set[psutil.Process]:
    """Everything that descends from this process or shares its group, but not itself."""
    me = psutil.Process()
    found = set(me.children(recursive=True))
    for pid in psutil.pids():
        if pid != me.pid and _in_our_group(pid):
            with contextlib.suppress(psutil.Error):
                found.add(psutil.Process(pid))
    return found


def _in_our_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == os.getpgrp()
    except OSError:
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _end(grace: float) -> None:
    """SIGTERM to the family, SIGKILL to who is left after the grace period."""
    seen = _family()
    asked = {process for process in seen if _in_our_group(process.pid)}
    deadline = time.monotonic() + grace
    # The group at once, us included: a shell whose command dies first would go on to its next line.
    os.killpg(os.getpgrp(), signal.SIGTERM)
    while True:
        seen |= _family()
        living = {process for process in seen if _lives(process)}
        if not living:
            return
        if time.monotonic() < deadline:
            _send(living - asked, signal.SIGTERM)
        else:
            _send(living, signal.SIGSTOP)
            _send(living, signal.SIGKILL)
        asked |= living
        time.sleep(0.05)


def _send(processes: set[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def main() -> int:
    """Run the command; its exit status, or 128 + signal."""
    grace, command = float(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":  # orphans in the family come to us, where they are found
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
