"""One stage on several machines: each runs its share as a flow run of its own, and torchrun joins their processes.

The machines share the workspace. Those of one stage meet by files in it: each notes that it has come; when all have,
machine 0 writes where torchrun's rendezvous is to be and lets DVC run the stage, the others run the stage's plain line;
at its end machine 0 writes that too, and whoever still waits ends. See docs/distributed.md.
"""

from __future__ import annotations

import contextvars
import json
import os
import platform
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from prefect.settings import PREFECT_API_URL

from tasks.shared.operations.processes import child_processes, launcher
from tasks.shared.operations.processes.dvc_runner import Outcome, PreemptedStage, StageError, Workspace
from tasks.shared.operations.processes.signals import TERMINATED
from tasks.shared.operations.text import safe
from tasks.shared.outputs import layout, stage

MEETINGS = layout.STATE / "meetings"
STAGES = launcher.STAGES
_POLL = 0.5
_SAY = 60.0  # seconds after which a machine says for which others it waits
_LAST = 15.0  # seconds that a share has to end by itself when another one has ended
_LOSSES = 5  # lost shares that are started again
_ENDED = "machine 0 has ended its share of the stage"
_ANOTHER = (_ENDED, "another process of this run failed")  # in the message of who did not fail itself
_DONE = ("run", "unchanged", "restored")


class Meeting:
    """The machines of one run of a stage, as one of them sees it, in the workspace in the current folder.

    Args:
        meeting: Its id.
        machines: How many there are.
        machine: Number of this one, from 0.

    Raises:
        StageError: If the numbers make no sense, or it is not known how the others reach this machine.
    """

    def __init__(self, meeting: str, machines: int, machine: int) -> None:
        if not meeting or not 0 <= machine < machines:
            raise StageError(
                f"expected a meeting and a machine below {machines}, got {meeting!r}, {machine}; run the flow, which "
                "starts the shares"
            )
        self._meeting, self._machines, self._machine = meeting, machines, machine
        self._address = address()

    def run(
        self,
        workspace: Workspace,
        name: str,
        *,
        on_line: Callable[[str], None],
        force: bool,
        env: dict[str, str],
        grace: float,
    ) -> Outcome:
        """Run this machine's share of a stage; on machine 0, by DVC.

        Args:
            workspace: Where DVC runs it.
            name: The stage as in DVC, one that can run on several processes.
            on_line: Receives each line of output.
            force: Run it even if nothing has changed.
            env: Added to the stage's environment.
            grace: Seconds that the stage has to save its state when it is stopped.

        Raises:
            PreemptedStage: If the stage was told to stop.
            StageError: If it failed, or can run on one machine only.
        """
        if name.partition("@")[0] not in STAGES:
            raise StageError(f"expected a stage that can run on several machines ({', '.join(STAGES)}), got {name!r}")
        self._note(self._machine, {"machine": platform.node(), "address": self._address})
        if self._machine:
            return self._join(name, on_line, env, grace)
        ended = "failed"
        try:
            outcome = workspace.run_stage(name, on_line=on_line, force=force, env=env | self._open(on_line))
            ended = outcome.what
        finally:
            self._note("end", {"ended": ended})
        return outcome

    def _open(self, on_line: Callable[[str], None]) -> dict[str, str]:
        """Wait until all have come, and tell them where they meet; torchrun's variables of this machine."""
        self._wait(on_line)
        with socket.socket() as probe:
            probe.bind((self._address, 0))
            port = probe.getsockname()[1]
        self._note("open", {"host": self._address, "port": port})
        on_line(f"{self._machines} machines meet at {self._address}:{port}: {', '.join(self._names())}")
        return self._environment(self._address, port)

    def _wait(self, on_line: Callable[[str], None]) -> None:
        begin, said = time.monotonic(), False
        while missing := [number for number in range(self._machines) if not self._read(number)]:
            if not said and time.monotonic() - begin > _SAY:
                said = True
                on_line(
                    f"warning: for {_SAY:g} s, {len(missing)} of {self._machines} machines have not come; waiting for "
                    "them. Does a worker run on each (python -m flows.serve --machine)?"
                )
            time.sleep(_POLL)

    def _names(self) -> list[str]:
        return ["{machine} ({address})".format(**self._read(number)) for number in range(self._machines)]

    def _join(self, name: str, on_line: Callable[[str], None], env: dict[str, str], grace: float) -> Outcome:
        """Run the stage's plain line until it, or machine 0's share, has ended."""
        begin = time.monotonic()
        while not (opened := self._read("open")):
            if self._read("end"):
                raise StageError(_ENDED)
            time.sleep(_POLL)
        kind, _, encoder = name.partition("@")
        command = [sys.executable, "-m", f"tasks.{kind}", *([encoder] if encoder else [])]
        tail: deque[str] = deque(maxlen=200)

        def note(line: str) -> None:
            tail.append(safe(line))
            on_line(safe(line))

        env = env | self._environment(str(opened["host"]), int(opened["port"]))
        with child_processes.ChildProcesses(grace=grace) as children:
            left = threading.Event()
            threading.Thread(target=self._stop_at_the_end, args=(children, left), daemon=True).start()
            try:
                status = children.stream(command, note, env=env)
            finally:
                left.set()
        ended = (self._read("end") or {}).get("ended")
        if ended in _DONE or (status == 0 and ended is None):
            return Outcome(name, ended or "run", time.monotonic() - begin, {})
        if status in (TERMINATED, 130) and not children.stopped:
            raise PreemptedStage(f"{name} was preempted: it was told to stop, and goes on when it is run again")
        if ended and children.stopped:
            raise StageError(_ENDED)
        errors = [line for line in tail if line.startswith("error: ")]
        raise StageError(errors[-1].removeprefix("error: ") if errors else f"{name} ended with status {status}")

    def _stop_at_the_end(self, children: child_processes.ChildProcesses, left: threading.Event) -> None:
        """Stop the share when machine 0 has ended: at once if DVC ran nothing there, else it may end by itself."""
        while not left.wait(_POLL):
            if end := self._read("end"):
                left.wait(0 if end["ended"] in ("unchanged", "restored") else _LAST)
                children.stop()
                return

    def _environment(self, host: str, port: int) -> dict[str, str]:
        """torchrun's variables, and by which network device the processes communicate."""
        variables = {
            "PET_NNODES": str(self._machines),
            "PET_NODE_RANK": str(self._machine),
            "PET_MASTER_ADDR": host,
            "PET_MASTER_PORT": str(port),
            "PET_RDZV_ENDPOINT": "",
            "PET_RDZV_ID": self._meeting,
            "PET_LOCAL_ADDR": self._address,
        }
        device = _device(self._address)
        devices = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if device else ()
        return variables | {name: device for name in devices if name not in os.environ}

    def _note(self, what: object, content: dict[str, Any]) -> None:
        stage.write_text(self._path(what), json.dumps(content))

    def _read(self, what: object) -> dict[str, Any]:
        """What a file of the meeting says, empty if it is not there."""
        try:
            found: dict[str, Any] = json.loads(self._path(what).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return found

    def _path(self, what: object) -> Path:
        return MEETINGS / self._meeting / f"{what}.json"


def address() -> str:
    """The IPv4 address by which others reach this machine: `DEEPCLUST_ADDRESS`, else that of the way to the server.

    Raises:
        StageError: If that is no address of this machine.
    """
    if given := os.environ.get("DEEPCLUST_ADDRESS", "").strip():
        try:
            with socket.socket() as probe:
                probe.bind((given, 0))
        except OSError as error:
            raise StageError(
                f"DEEPCLUST_ADDRESS: expected an address of {platform.node()}, got {given!r}; mend or unset it"
            ) from error
        return given
    server = urlsplit(PREFECT_API_URL.value() or "http://127.0.0.1:4200")
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((server.hostname, server.port or 443))  # sends nothing
        except OSError as error:
            raise StageError(
                f"expected a way to Prefect's server at {server.hostname}, got: {error.strerror}; set "
                "DEEPCLUST_ADDRESS to this machine's address"
            ) from error
        return str(probe.getsockname()[0])


def _device(host: str) -> str:
    """The network device that has an address, empty if none is known to."""
    found = [name for name, own in psutil.net_if_addrs().items() if host in {one.address for one in own}]
    return found[0] if found else ""


class _Share(threading.Thread):
    """One machine's share of a stage, awaited in a thread with Prefect's context."""

    def __init__(self, run: Callable[[int], Outcome], machine: int) -> None:
        context = contextvars.copy_context()
        super().__init__(target=lambda: context.run(self._await, run, machine), daemon=True)
        self.machine = machine
        self.outcome: Outcome | None = None
        self.error: StageError | None = None
        self.start()

    def _await(self, run: Callable[[int], Outcome], machine: int) -> None:
        try:
            self.outcome = run(machine)
        except StageError as error:
            self.error = error
        except Exception as error:  # a bug: nobody may wait for ever
            self.error = StageError(f"machine {machine}: {type(error).__name__}: {error}")


def _has_failed(share: _Share) -> bool:
    return share.error is not None and not isinstance(share.error, PreemptedStage)


def run_together(
    run: Callable[[int], Outcome], cancel: Callable[[int], None], machines: int, *, on_line: Callable[[str], None]
) -> Outcome:
    """Run each machine's share of a stage until all have ended; what becomes of machine 0's.

    The share of another machine that is lost is run again, for machine 0 waits for it.

    Args:
        run: Runs a machine's share, as `Remote.run_stage` does.
        cancel: Cancels a machine's share.
        machines: How many.
        on_line: Receives what there is to say.

    Raises:
        PreemptedStage: If machine 0's share was preempted or lost.
        StageError: If a share failed; where one only says that another did, with the other's error.
    """
    first, *others = (_Share(run, machine) for machine in range(machines))
    losses = 0
    while first.is_alive() and not any(_has_failed(share) for share in others):
        first.join(_POLL)
        for share in [share for share in others if isinstance(share.error, PreemptedStage)]:
            first.join(_LAST)  # perhaps all were told to stop
            if first.is_alive() and losses < _LOSSES:
                losses += 1
                on_line(f"warning: the share of machine {share.machine} starts again: {share.error}")
                others[share.machine - 1] = _Share(run, share.machine)
    for share in (first, *others):
        share.join(2 * _LAST if first.outcome else _LAST)
        if share.is_alive():
            cancel(share.machine)
            share.join()
    if first.outcome:
        return first.outcome
    errors = [share.error for share in (first, *others) if share.error]
    if not isinstance(first.error, PreemptedStage):
        errors.sort(key=lambda error: any(text in str(error) for text in _ANOTHER))
    raise errors[0]
