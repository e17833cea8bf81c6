"""A process of the pipeline is killed at some moment, and the same command is given again.

What is killed: `dvc repro`, the flow, the stage in either, one of two workers, Prefect's server, MLflow's server; by
SIGKILL, SIGTERM or SIGINT, which goes to the whole group, as from a terminal; from the start of a stage to what DVC
does after it. Then `dvc.lock` has to be that of an undisturbed run, no process may be left after 15 s, and after the
next start there is no file that an undisturbed run would not leave.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.faults import repository, running, workspace
from benchmarks.faults.repository import DVC, FLOW
from benchmarks.faults.workspace import ENCODER

STAGES = ("prepare", *(f"{stage}@{ENCODER}" for stage in workspace.STAGES), "report")
SEVERAL = STAGES[1:4]  # those that run on two processes
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# When, and how many seconds later at most.
MOMENTS = {"start": 1.5, "stage": 2.0, "work": 0.5, "outputs": 0.0, "end": 0.5}
PLAN = {"dvc": 10, "stage": 7, "flow": 7, "flow's stage": 3, "worker": 5, "Prefect's server": 4, "MLflow's server": 4}
_PATIENCE = 45.0  # seconds from the kill to the end of what was not killed itself
_ORPHANS = 15.0
_NEXT = 180.0


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What is killed, how and when.

    Attributes:
        number: Of the kill; draws the moment.
        what: A name of `PLAN`.
        signal: By which signal.
        stage: While which stage runs.
        moment: A name of `MOMENTS`.
    """

    number: int
    what: str
    signal: signal.Signals
    stage: str
    moment: str

    @property
    def name(self) -> str:
        """All of it in a line."""
        return f"kill: {self.what} by {self.signal.name} in {self.stage} at {self.moment}"


@dataclass(frozen=True, kw_only=True)
class Killed:
    """What came of it: nothing wrong, or what.

    Attributes:
        kill: The kill.
        wrong: What is not as it should be, or nothing.
        seconds: For all of it.
        said: Exit status of the killed run, and its last line.
    """

    kill: Kill
    wrong: str
    seconds: float
    said: str


def plan(count: int, seed: int) -> list[Kill]:
    """So many kills, the shares as in `PLAN`; of each, signals, stages and moments in turn, from drawn starts."""
    draw = random.Random(seed)
    every = []
    for what, share in PLAN.items():
        stages = list(SEVERAL if what == "worker" else STAGES)
        moments = ["stage", "work"] if what in ("worker", "stage", "flow's stage") else list(MOMENTS)
        signals = SIGNALS[:2] if "server" in what or what == "worker" else SIGNALS
        draw.shuffle(stages)
        draw.shuffle(moments)
        every += [
            (turn / share, what, signals[turn % len(signals)], stages[turn % len(stages)], moments[turn % len(moments)])
            for turn in range(share)
        ]
    return [
        Kill(number=number, what=what, signal=by, stage=stage, moment=moment)
        for number, (_, what, by, stage, moment) in enumerate(sorted(every)[:count])
    ]


class Killer:
    """Kills in copies of a repository.

    Args:
        repo: The repository, with a pipeline that has run undisturbed.
        scratch: Where copies go.
        home: Home folder of the commands.
        seed: Draws the moments.
    """

    def __init__(self, repo: Path, scratch: Path, home: Path, seed: int) -> None:
        self._repo, self._scratch, self._home, self._seed = repo, scratch, home, seed
        self._files = repository.left(repo)
        self._lock = repository.lock(repo / "work")
        self._of_two: dict[str, object] = {}

    def run(self, kills: Sequence[Kill], at_once: int) -> Iterator[Killed]:
        """Kill, so many at once; gives each as it ends."""
        for stage in sorted({kill.stage for kill in kills if kill.what == "worker"}):
            self._of_two[stage] = self._undisturbed_by_two(stage)
        with ThreadPoolExecutor(at_once) as pool:
            yield from pool.map(self._kill, kills)

    def _undisturbed_by_two(self, stage: str) -> object:
        folder = self._copy(f"two-{stage}", stage)
        process = repository.start(_argv("worker", stage), folder, self._home, _ENV["worker"])
        status, said = repository.finish(process, folder, seconds=_NEXT)
        if status:
            raise workspace.Failed(f"{stage} on two processes ended with {status} undisturbed: {said[-2000:]}")
        found: object = repository.lock(folder / "work")[stage]["outs"]
        running.discard(folder)
        return found

    def _copy(self, name: str, stage: str) -> Path:
        folder = self._scratch / name
        shutil.copytree(self._repo, folder, symlinks=True)
        repository.forget(folder / "work", stage)
        return folder

    def _kill(self, kill: Kill) -> Killed:
        begin = time.monotonic()
        folder = self._copy(f"kill-{kill.number}", kill.stage)
        draw = random.Random(f"{self._seed}-{kill.number}")
        try:
            wrong, said = self._killed(kill, folder, draw)
        except Exception as error:
            wrong, said = f"harness: {type(error).__name__}: {error}", ""
        for name in running.outlived(folder, seconds=0):
            wrong = wrong or f"left at the very end: {name}"
        running.discard(folder)
        return Killed(kill=kill, wrong=wrong, seconds=time.monotonic() - begin, said=said)

    def _killed(self, kill: Kill, folder: Path, draw: random.Random) -> tuple[str, str]:
        with contextlib.ExitStack() as stack:
            env = dict(_ENV.get(kill.what, {}))
            server = None
            if kill.what == "MLflow's server":
                server, address = stack.enter_context(_mlflow(folder, self._home))
                env |= {"DEEPCLUST_TRACKING": "on", "MLFLOW_TRACKING_URI": address}
            argv = _argv(kill.what, kill.stage)
            process = repository.start(argv, folder, self._home, env)
            victim = _wait(kill, process, server, folder / "work", draw)
            if victim is None:
                status, said = repository.finish(process, folder, seconds=_NEXT)
                return f"nothing to kill: ended with {status}: {_last(said)}", ""
            _send(kill, victim)
            status, said = repository.finish(process, folder, seconds=_PATIENCE + (_NEXT if server else 0))
        notes = f"{status}: {_last(said)}"
        if status is None:
            return f"no end within {_PATIENCE:g} s: {_last(said)}", notes
        if "server" in kill.what and "Traceback" in said:
            return f"a traceback: {_last(said)}", notes
        at_once = kill.number % 3 == 0
        orphans = [] if at_once else running.outlived(folder, seconds=_ORPHANS)
        again, then = self._again(kill, folder, at_once)
        orphans += running.outlived(folder, seconds=_ORPHANS)
        claims = {
            f"{len(orphans)} orphan(s): {'; '.join(orphans)}": not orphans,
            f"the next start ended with {again}: {_last(then)}": again == 0,
            **self._as_undisturbed(kill, folder),
        }
        return "; ".join(what for what, right in claims.items() if not right), notes

    def _again(self, kill: Kill, folder: Path, at_once: bool) -> tuple[int | None, str]:
        """The next start. One that comes at once may be told that the first is still ending; then once more."""
        for _ in range(2):
            process = repository.start(_argv(kill.what, kill.stage), folder, self._home, _ENV.get(kill.what, {}))
            status, said = repository.finish(process, folder, seconds=_NEXT)
            if status == 0 or not at_once:
                break
            running.outlived(folder, seconds=_ORPHANS)
        return status, said

    def _as_undisturbed(self, kill: Kill, folder: Path) -> dict[str, bool]:
        work = folder / "work"
        with contextlib.suppress(OSError, KeyError):
            now = repository.lock(work)
            if kill.what == "worker":
                return {"dvc.lock differs": now[kill.stage]["outs"] == self._of_two[kill.stage]}
            different = [stage for stage in self._lock if now.get(stage) != self._lock[stage]]
            more = sorted(name for name in repository.left(folder) - self._files if not _queued(kill, name))
            return {
                f"dvc.lock differs in {', '.join(different)}": not different,
                f"left {', '.join(more)}": not more,
            }
        return {"dvc.lock is not there": False}


_ENV: Mapping[str, Mapping[str, str]] = {"worker": {"PET_NPROC_PER_NODE": "2", "DEEPCLUST_THREADS": "2"}}


def _argv(what: str, stage: str) -> list[str]:
    if what in ("flow", "flow's stage", "Prefect's server"):
        return FLOW
    return [*DVC, "--single-item", stage] if what == "worker" else DVC


def _queued(kill: Kill, name: str) -> bool:
    """Whether a file waits for MLflow's server, which has not come back."""
    return kill.what == "MLflow's server" and name.startswith("state/")


def _wait(
    kill: Kill, process: subprocess.Popen[bytes], server: psutil.Process | None, work: Path, draw: random.Random
) -> psutil.Process | None:
    """The process to kill, at the moment to do it; None if all was over before."""
    name, _, encoder = kill.stage.partition("@")
    out = work / workspace.outputs(name, encoder or None)[0]
    partial = out.with_name(f".{out.name}.partial")
    seen: psutil.Process | None = None
    delay = draw.uniform(0, MOMENTS[kill.moment])
    while process.poll() is None:
        family = _family(process.pid)
        stages = [each for each, line in family.items() if f"tasks.{name}" in line and not line[0].endswith("sh")]
        seen = stages[0] if stages else seen
        there = {
            "start": True,
            "stage": seen is not None,
            "work": partial.exists(),
            "outputs": out.exists(),
            "end": seen is not None and not stages,
        }
        victim = _victim(kill.what, psutil.Process(process.pid), family, stages, server)
        if there[kill.moment] and victim:
            time.sleep(delay)
            return victim
        time.sleep(0.02)
    return None


def _victim(
    what: str,
    launcher: psutil.Process,
    family: Mapping[psutil.Process, Sequence[str]],
    stages: Sequence[psutil.Process],
    server: psutil.Process | None,
) -> psutil.Process | None:
    if what == "MLflow's server":
        return server
    if what == "Prefect's server":
        return next(
            (each for each, line in family.items() if {"prefect", "start"} <= set(line) and "-I" not in line), None
        )
    if what == "worker":
        ranks = [each for each in stages if _rank(each)]
        return ranks[-1] if len(ranks) == 2 else None
    return next(iter(stages), None) if what.endswith("stage") else launcher


def _family(pid: int) -> dict[psutil.Process, list[str]]:
    found = {}
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found[process] = process.cmdline() or [""]
    return found


def _rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "RANK" in process.environ()
    return False


def _send(kill: Kill, victim: psutil.Process) -> None:
    if kill.signal == signal.SIGINT and kill.what in ("dvc", "flow"):
        with contextlib.suppress(OSError):
            os.killpg(victim.pid, signal.SIGINT)
        return
    for process in [victim, *(_family(victim.pid) if "server" in kill.what else [])]:
        with contextlib.suppress(psutil.Error):
            process.send_signal(kill.signal)


@contextlib.contextmanager
def _mlflow(folder: Path, home: Path) -> Iterator[tuple[psutil.Process, str]]:
    """MLflow's server, which answers; gone in the end."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    place = folder / "mlflow"
    place.mkdir()
    env = running.environment(place, home, {})
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{place}/mlflow.db", "--artifacts-destination", str(place / "files")]
    with (place / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=place, env=env | {"TMPDIR": str(place)}, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise workspace.Failed(f"MLflow's server did not come up: {(place / 'log').read_text()[-500:]}")
            time.sleep(0.3)
        yield psutil.Process(server.pid), address
    finally:
        server.kill()
        server.wait()
        running.outlived(place, seconds=0)


def _last(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
