"""Commands in forked children of one process that has imported the heavy modules, so that a command costs no import.

A child goes into the case's copy of the workspace, does the damage there, and runs the module as `python -m` does, or
really starts Python. Nothing else of the case happens in the parent, which only waits.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import logging
import os
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_MEMORY = 16 << 30  # bytes of address space, so that no case takes the machine's memory
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LONGEST = 30.0  # seconds, after which a command counts as hung
MARK = "FAULTS_RUN"  # in the environment of all that a case starts
ROOT = Path(__file__).resolve().parents[2]
_HEAVY = (
    *("torch", "sklearn.manifold", "scipy.optimize", "matplotlib.pyplot", "faiss"),
    *("tasks.prepare", "tasks.pretrain", "tasks.embed", "tasks.cluster", "tasks.linear", "tasks.adapt", "tasks.report"),
    *("tasks.params", "tasks.overrides", "tasks.assign", "deepclust.methods.swav", "deepclust.methods.random"),
)
_TRACKING = (
    *("mlflow", "tasks.model.mlflow_model", "mlflow.system_metrics.system_metrics_monitor", "tasks.register"),
    *("mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store", "alembic.command"),
)
_FLOWS = ("prefect", "dvc.repo", "flows.pipeline", "flows.stage")
_OURS = ("DEEPCLUST_", "PET_", "MLFLOW_", "PREFECT_", "DVC_", "OMP_", "XDG_")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is run.

    Attributes:
        argv: Module and arguments, as after `python -m`.
        real: Whether Python is really started; else the module runs in the forked child.
    """

    argv: Sequence[str]
    real: bool = False


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
        status: Exit status, negative for a signal; None if it hung.
        out: Standard output.
        err: Standard error.
        seconds: Wall clock.
        left: Commands of the processes that outlived it.
    """

    status: int | None
    out: str
    err: str
    seconds: float
    left: Sequence[str] = ()


@dataclass(kw_only=True)
class Job:
    """A command to run in a folder of its own.

    Attributes:
        folder: Holds `work`, the workspace, `tmp`, and the two outputs.
        command: What is run there.
        before: Is called first, in the workspace; the damage. May give variables for the environment.
        env: Variables that are added; one that is None is removed.
        limit: Most bytes that a file may have: a disk that is full.
        stdout: Where standard output goes, else into a file.
        longest: Seconds, after which it counts as hung.
    """

    folder: Path
    command: Command
    before: Callable[[], dict[str, str] | None] = lambda: None
    env: Mapping[str, str | None] = field(default_factory=dict)
    limit: int | None = None
    stdout: Path | None = None
    longest: float = LONGEST
    pid: int = 0
    begin: float = 0.0
    pipes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def open_pipes(self) -> None:
        """Have both outputs go into pipes, each of which holds a megabyte."""
        for name in ("out", "err"):
            self.pipes[name] = os.pipe()
            fcntl.fcntl(self.pipes[name][1], fcntl.F_SETPIPE_SZ, 1 << 20)

    def close_pipes(self) -> None:
        """Put what is in the pipes into the files where it would have gone."""
        for name, (read, write) in self.pipes.items():
            os.close(write)
            os.set_blocking(read, False)
            with contextlib.suppress(BlockingIOError):  # a process of the command still holds it, and has said nothing
                (self.folder / name).write_bytes(os.read(read, 1 << 20))
            os.close(read)

    @property
    def work(self) -> Path:
        """The workspace."""
        return self.folder / "work"


def load(*, tracking: bool, flows: bool) -> None:
    """Import what the commands import, once.

    Args:
        tracking: Also what those do that reach MLflow.
        flows: Also what the flows do.

    Raises:
        RuntimeError: If that has started a thread, which no forked child would have.
    """
    for name in (*_HEAVY, *(_TRACKING if tracking else ()), *(_FLOWS if flows else ())):
        if hasattr(importlib.import_module(name), "__path__") and name.startswith("tasks."):
            importlib.import_module(f"{name}.__main__")
    if threading.active_count() > 1:
        raise RuntimeError(f"expected one thread before forking, got {threading.enumerate()}")
    gc.collect()
    gc.freeze()  # so that a collection in a child touches, and so copies, none of the parent's memory


def environment(folder: Path, home: Path, env: Mapping[str, str | None]) -> dict[str, str]:
    """The environment of a command: quiet, on one thread, without tracking, with nothing of the caller's settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    ours = {
        "CUDA_VISIBLE_DEVICES": "",
        "DEEPCLUST_THREADS": "1",
        "DEEPCLUST_TRACKING": "off",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "HOME": str(home),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder / "tmp"),
        MARK: str(folder),
    }
    merged: dict[str, str | None] = {**inherited, **ours, **env}
    return {name: value for name, value in merged.items() if value is not None}


def run(jobs: Iterable[Job], *, at_once: int, home: Path) -> Iterator[tuple[Job, Ended]]:
    """Run jobs, so many at once, and give each as it ends."""
    waiting, running = iter(jobs), list[Job]()
    more = True
    try:
        while more or running:
            while more and len(running) < at_once:
                job = next(waiting, None)
                more = job is not None
                if job is not None:
                    _start(job, home)
                    running.append(job)
            for job in list(running):
                pid, status = os.waitpid(job.pid, os.WNOHANG)
                hung = not pid and time.monotonic() - job.begin > job.longest
                if pid or hung:
                    running.remove(job)
                    yield job, _ended(job, None if hung else os.waitstatus_to_exitcode(status))
            time.sleep(0.004)
    finally:
        for job in running:
            _ended(job, None)


def marked(folder: Path) -> list[psutil.Process]:
    """The processes that were started, at some remove, by the command of a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def outlived(folder: Path, *, seconds: float) -> list[str]:
    """Commands of the marked processes that are still there after so many seconds; they are ended."""
    deadline = time.monotonic() + seconds
    while (left := marked(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    names = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(process.cmdline())[:120])
            process.kill()
    return names


def _start(job: Job, home: Path) -> None:
    (job.folder / "tmp").mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if job.limit is not None:
        job.open_pipes()
    job.begin = time.monotonic()
    job.pid = os.fork()
    if not job.pid:
        status = 70
        try:
            status = _child(job, home)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)


def _child(job: Job, home: Path) -> int:
    """Run the command in this process, which was forked for it; the exit status."""
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # the parent's, such as of temporary folders
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        # On a full disk what is said goes into a pipe, for the limit is one of every file.
        place = job.stdout if job.stdout and name == "out" else job.folder / name
        os.dup2(job.pipes[name][1] if name in job.pipes else os.open(place, _WRITE), number)
    for name in (1, 2):  # as Python sets them up where they are no terminal
        stream = open(name, "w", encoding="utf-8", errors="backslashreplace" if name == 2 else "strict", buffering=-1)  # noqa: PTH123, SIM115
        setattr(sys, ("stdout", "stderr")[name - 1], stream)
    sys.stderr.reconfigure(line_buffering=True)
    os.chdir(job.work)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    env = environment(job.folder, home, {**job.env, **(job.before() or {})})
    there = [path.as_posix() for path in Path().rglob("*") if path.is_file()]
    Path("../there").write_text("\n".join(there), encoding="utf-8", errors="surrogateescape")
    if job.limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.limit, job.limit))
    module, *arguments = job.command.argv
    if job.command.real:
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], env)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    sys.argv = [module, *arguments]
    if not module.startswith("flows."):
        logging.getLogger().handlers.clear()  # Prefect's, which the other commands never import
    return _module(module)


def _module(name: str) -> int:
    """Run a module as `python -m` does; its exit status."""
    status = 0
    for loaded in (name, f"{name}.__main__"):  # runpy warns of modules that are there already
        if not hasattr(sys.modules.get(loaded), "__path__"):
            sys.modules.pop(loaded, None)
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 1
    for end in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        with contextlib.suppress(Exception):
            end()
    try:
        sys.stdout.flush()
    except OSError as error:  # as the interpreter says at its end
        print(f"Exception ignored in: <stdout> {error}", file=sys.stderr)
        status = status or 120
    return status


def _ended(job: Job, status: int | None) -> Ended:
    seconds = time.monotonic() - job.begin
    with contextlib.suppress(OSError):
        os.killpg(job.pid, signal.SIGKILL)
    if status is None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(job.pid, 0)
    left = outlived(job.folder, seconds=15 if status is not None else 0) if job.command.real else []
    job.close_pipes()
    out, err = (_text(job.folder / name) for name in ("out", "err"))
    return Ended(status=status, out=out, err=err, seconds=seconds, left=left)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""


def discard(folder: Path) -> None:
    """Remove a case's folder."""
    shutil.rmtree(folder, ignore_errors=True)
