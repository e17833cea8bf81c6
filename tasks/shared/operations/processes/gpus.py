"""Locks of this machine's GPUs: a stage that computes has its GPU to itself, whichever flow of this user runs it.

with held_for("pretrain", stopped=…, on_wait=print) as gpus:
    run(command, env=gpus.env)

The kernel releases a lock with the last process that keeps it open. Without a GPU there is nothing to wait for.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from deepclust.errors import StageError
from tasks.shared.operations.processes import launcher

COMPUTING = ("pretrain", "embed", "cluster", "linear", "adapt")  # the stages that use a GPU
VISIBLE = "CUDA_VISIBLE_DEVICES"
FOLDER = "DEEPCLUST_GPU_LOCKS"  # where the locks are; containers share no temporary folder
_POLL = 0.2

Found = TypeVar("Found")


@dataclass(frozen=True)
class Held:
    """GPUs that are held.

    Attributes:
        env: Names them to CUDA; empty where there is none.
        descriptors: The locks: whoever keeps them open holds the GPUs.
    """

    env: dict[str, str] = field(default_factory=dict)
    descriptors: tuple[int, ...] = ()


@contextmanager
def held_for(stage: str, *, stopped: Callable[[], bool], on_wait: Callable[[str], None]) -> Iterator[Held]:
    """Hold the GPUs that a stage computes on: as many as its processes on this machine, `PET_NPROC_PER_NODE`.

    They are of `CUDA_VISIBLE_DEVICES` where it is set. If there are fewer, all of them are held.

    Args:
        stage: Its name without the encoder.
        stopped: Whether not to go on waiting.
        on_wait: Receives a line, once, if the stage has to wait.

    Raises:
        StageError: If it is stopped meanwhile, or the locks can not be kept.
    """
    devices = _devices() if stage in COMPUTING else {}
    if not devices:
        yield Held()
        return
    number = min(_processes(stage), len(devices))
    folder = _folder()
    waited: list[str] = []

    def wait_for(attempt: Callable[[], Found | None]) -> Found:
        while (found := attempt()) is None:
            if stopped():
                raise StageError(f"{stage} was stopped")
            if not waited:
                waited.append(f"{stage} waits for {number} of {len(devices)} GPUs, which others hold")
                on_wait(waited[0])
            time.sleep(_POLL)
        return found

    taken: dict[str, int] = {}

    def take_one() -> str | None:
        for name in (name for name in devices if name not in taken):
            if (descriptor := _lock(folder, name)) is not None:
                stack.callback(os.close, descriptor)
                taken[name] = descriptor
                return name
        return None

    with ExitStack() as stack:
        with ExitStack() as gathering:
            if number > 1:  # who gathers several keeps those it has, and two at once would wait for each other
                gathering.callback(os.close, wait_for(lambda: _lock(folder, "several")))
            while len(taken) < number:
                wait_for(take_one)
        env = {VISIBLE: ",".join(entry for name, entry in devices.items() if name in taken)}
        yield Held(env, tuple(taken.values()))


def _processes(stage: str) -> int:
    text = os.environ.get("PET_NPROC_PER_NODE", "").strip() if stage in launcher.STAGES else ""
    if text in ("gpu", "auto"):
        return launcher.MACHINES  # more than there are
    return int(text) if text.isdecimal() and 0 < int(text) < launcher.MACHINES else 1


def _devices() -> dict[str, str]:
    """The GPUs that this process may use: a name for the lock, and what CUDA calls it, in CUDA's order."""
    if not (listed := _listed()):
        return {}
    chosen = os.environ.get(VISIBLE)
    found = {}
    for entry in listed if chosen is None else map(str.strip, chosen.split(",")):
        if entry.isdecimal() and int(entry) < len(listed):
            found[listed[int(entry)]] = entry
        elif entry.startswith(("GPU-", "MIG-")):  # the beginning of a name is enough for CUDA
            found[next((name for name in listed if name.startswith(entry)), entry)] = entry
        else:
            break  # CUDA sees none from here on
    return found


def _listed() -> list[str]:
    """The names of this machine's GPUs, by their driver; importing torch would take seconds."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, or one that does not answer: the stage will say what it makes of that
        return []
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _folder() -> Path:
    """Of this user alone: a lock in a folder of others could be held, or led elsewhere, by them."""
    path = Path(os.environ.get(FOLDER) or Path(tempfile.gettempdir()) / f"deepclust-gpus-{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise StageError(f"expected {path} to be a folder that only you can write to, got another; remove it")
    return path


def _lock(folder: Path, name: str) -> int | None:
    """A descriptor that holds the lock, None if another does."""
    path = folder / f"{re.sub(r'[^A-Za-z0-9-]', '-', name)}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
