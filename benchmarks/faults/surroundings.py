"""Faults around a run: environment, tracking, a full disk, edits and a second run meanwhile, damaged saved states."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults import workspace
from benchmarks.faults.cases import EITHER, SAME, TRACKED, Case, Ended, Reference
from benchmarks.faults.damage import ANY, CONTENT, junk, put
from benchmarks.faults.inputs import key
from benchmarks.faults.workspace import ENCODER

SOON = 10.0  # seconds in which a store or a setting that can not work has to be named
SECRET = "hunter2"


# Environment.


def _environment() -> Iterator[Case]:
    for text in ("0", "-1", "many", "1.5", "nan", str(10**9), "9" * 30, "²"):
        for command in ("embed", "prepare", "assign"):
            env = {"DEEPCLUST_THREADS": text}
            yield Case(fault=f"environment: DEEPCLUST_THREADS={text}", command=command, env=env, longest=SOON)
    for text in ("0", "-1", "many", str(10**9)):
        env = {"DEEPCLUST_PARALLEL": text, "DEEPCLUST_THREADS": None}
        yield Case(fault=f"environment: DEEPCLUST_PARALLEL={text}", command="embed", env=env, longest=SOON)
    for text in ("0", "soon"):
        env = {"DEEPCLUST_COLLECTIVE_SECONDS": text, "PET_NPROC_PER_NODE": "2"}
        yield Case(fault=f"environment: DEEPCLUST_COLLECTIVE_SECONDS={text}", command="embed", env=env, real=True)
    yield Case(fault="environment: DEEPCLUST_RESUME=maybe", command="pretrain", env={"DEEPCLUST_RESUME": "maybe"})
    for text in ("0", "-1", "many"):
        env = {"PET_NPROC_PER_NODE": text, "DEEPCLUST_THREADS": "2"}
        yield Case(fault=f"environment: PET_NPROC_PER_NODE={text}", command="embed", env=env, real=True)
    env = {"PET_NNODES": "many"}
    yield Case(fault="environment: PET_NNODES=many", command="embed", env=env, real=True)
    env = {"PET_NNODES": "2"}
    yield Case(fault="environment: PET_NNODES=2 without an address", command="embed", env=env, real=True)
    for name, value in (("TMPDIR", "/nowhere"), ("HOME", "/nowhere"), ("HOME", None), ("LC_ALL", "C")):
        for command in ("prepare", "embed", "assign"):
            env_: dict[str, str | None] = {name: value}
            said = "unset" if value is None else value
            yield Case(fault=f"environment: {name} {said}", command=command, env=env_, right=SAME)


# Tracking.


def _silent_server() -> dict[str, str]:
    """A server that takes connections and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if not os.fork():
        time.sleep(120)
        os._exit(0)
    return {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}


def _babbling_server() -> dict[str, str]:
    """A server that answers anything but MLflow's API."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if not os.fork():
        while True:
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nConnection: close\r\n\r\n<html>\r\n</ht")
            connection.close()
    listener.close()
    return {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}


def _locked() -> None:
    """A store that another process has locked."""
    ready, write = os.pipe()
    if not os.fork():
        holder = sqlite3.connect("mlflow.db")
        holder.execute("BEGIN EXCLUSIVE")
        os.write(write, b"x")
        time.sleep(120)
        os._exit(0)
    os.read(ready, 1)


def _no_secret(_: Path, ended: Ended, __: Reference | None) -> str:
    return "the password is printed" if SECRET in ended.out + ended.err else ""


def _tracking() -> Iterator[Case]:
    store = Path("mlflow.db")
    wrong: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
        "mlflow.db is a folder": (lambda: ANY["a folder"](store), {}),
        "mlflow.db is junk": (lambda: junk(store), {}),
        "mlflow.db is cut": (lambda: ANY["cut"](store), {}),
        "mlflow.db is locked": (_locked, {}),
        "mlflow.db is a link loop": (lambda: ANY["a link loop"](store), {}),
        "nobody answers": (lambda: None, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}),
        "a server that never answers": (_silent_server, {}),
        "a server of something else": (_babbling_server, {}),
        "no such host": (lambda: None, {"MLFLOW_TRACKING_URI": "http://no.such.host.invalid"}),
        "no such scheme": (lambda: None, {"MLFLOW_TRACKING_URI": "gopher://x"}),
        "no address": (lambda: None, {"MLFLOW_TRACKING_URI": "nonsense://"}),
        "an SQLite file in a folder that is none": (lambda: None, {"MLFLOW_TRACKING_URI": "sqlite:////proc/x/y.db"}),
        "a password": (lambda: None, {"MLFLOW_TRACKING_URI": f"http://user:{SECRET}@127.0.0.1:9"}),
        "a token": (lambda: None, {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:9/?token={SECRET}"}),
        "a database's password": (lambda: None, {"MLFLOW_TRACKING_URI": f"postgresql://u:{SECRET}@127.0.0.1:9/x"}),
        "an unknown parent run": (lambda: None, {"DEEPCLUST_PARENT_RUN": "nobody"}),
    }
    for name, (make, env) in wrong.items():
        for command in ("embed", "register"):
            if "parent" in name and command == "register":
                continue
            yield Case(
                fault=f"tracking: {name}",
                command=command,
                make=make,
                env=TRACKED | env,
                check=_no_secret,
                longest=SOON,
            )
    for text in ("off", "0", "false"):
        env = {"DEEPCLUST_TRACKING": text, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
        yield Case(fault=f"tracking: DEEPCLUST_TRACKING={text}", command="embed", env=env, right=SAME)


# Disk.


def _disk() -> Iterator[Case]:
    for command in ("prepare", *workspace.STAGES, "report"):
        for limit in (64, 900):
            yield Case(fault=f"disk: full after {limit} bytes of a file", command=command, limit=limit)
    for command in ("prepare", "pretrain", "embed", "report"):
        stage = f"artifacts/{command}" if command in ("prepare", "report") else f"artifacts/{command}/{ENCODER}"

        def a_file(stage: str = stage) -> None:
            put(Path(stage), "no folder")

        yield Case(fault="disk: a file in place of the stage's folder", command=command, make=a_file, right=EITHER)
    yield Case(fault="disk: a file in place of metrics/", command="embed", make=lambda: put(Path("metrics"), "x"))
    yield Case(fault="disk: a file in place of state/", command="pretrain", make=lambda: put(Path("state"), "x"))
    yield Case(fault="disk: a file in place of artifacts/", command="prepare", make=lambda: put(Path("artifacts"), "x"))


# What changes while a stage runs.


def while_running(stage: str, change: Callable[[], Any]) -> Callable[[], None]:
    """Change something as soon as the stage has read its parameters, which is when it makes its folder."""
    encoder = None if stage in ("prepare", "report") else ENCODER
    folder = Path(workspace.outputs(stage, encoder)[0])
    partial = folder.with_name(f".{folder.name}.partial")

    def make() -> None:
        if os.fork():
            return
        deadline = time.monotonic() + 25
        while not partial.exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        change()
        Path("../changed").touch()
        os._exit(0)

    return make


def _was_changed(work: Path, _: Ended, __: Reference | None) -> str:
    return "" if (work.parent / "changed").exists() else "the stage ended before anything was changed"


def _meanwhile() -> Iterator[Case]:
    own = {
        "prepare": key("test_fraction", "0.4", "data"),
        "pretrain": key("temperature", "0.9", "  swav"),
        "embed": key("batch_size", "7", "embed"),
        "cluster": key("seeds", "3", "cluster"),
        "linear": key("iterations", "3", "linear"),
        "adapt": key("images", "7", "adapt"),
        "report": key("map_images", "20", "report"),
    }
    for command, change in own.items():
        make = while_running(command, change)
        yield Case(fault="meanwhile: its parameters change", command=command, make=make, check=_was_changed)
    other = key("iterations", "3", "linear")
    for command in ("prepare", "pretrain", "embed", "cluster"):
        make = while_running(command, other)
        yield Case(
            fault="meanwhile: others' parameters change", command=command, make=make, check=_was_changed, right=SAME
        )
    for command in own:
        make = while_running(command, lambda: put(Path("params.yaml"), "seed: ["))
        yield Case(fault="meanwhile: params.yaml breaks", command=command, make=make, check=_was_changed)
    inputs = {
        "prepare": lambda: workspace.pictures(Path("images"), 1, seed=9),
        "pretrain": lambda: _touch("artifacts/prepare/images/16/train.npy"),
        "embed": lambda: _touch("artifacts/prepare/images/16/train.npy"),
        "cluster": lambda: _touch(f"artifacts/embed/{ENCODER}/train.npy"),
        "linear": lambda: _touch("artifacts/prepare/train/labels.npy"),
        "adapt": lambda: workspace.pictures(Path("domains/dark"), 1, seed=9),
        "report": lambda: put(Path(f"metrics/embed/{ENCODER}.json"), '{"dim": 3, "rankme": 1.0}\n'),
    }
    for command, change in inputs.items():
        make = while_running(command, change)
        yield Case(fault="meanwhile: what it reads changes", command=command, make=make, check=_was_changed)
    for command in (*own, "assign"):
        yield Case(
            fault="meanwhile: the same command runs beside it",
            command=command,
            make=_twin,
            right=EITHER,
            check=_twin_too,
        )


def _touch(name: str) -> None:
    """Another array of the same shape in its place."""
    path = Path(name)
    array = np.load(path)
    partial = path.with_name("new.npy")
    np.save(partial, array[::-1])
    partial.replace(path)


def _twin() -> None:
    """Run the same command twice: this process goes on in two."""
    if twin := os.fork():
        atexit.register(lambda: _reap(twin))
        return
    for number, name in ((1, "out2"), (2, "err2")):
        os.dup2(os.open(Path("..") / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def _reap(twin: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not os.waitpid(twin, os.WNOHANG)[0]:
        time.sleep(0.01)


def _twin_too(work: Path, _: Ended, __: Reference | None) -> str:
    said = (work.parent / "err2").read_text(encoding="utf-8")
    return "a traceback of the other" if "Traceback" in said else ""


# Saved states.


def cut_off() -> None:
    """Have this process, which is about to train, killed after the fourth update."""
    main = os.getpid()
    if os.fork():
        return
    runs = Path("state/pretrain") / ENCODER / "runs"
    while not list(runs.glob("*/step-00000004")):
        time.sleep(0.0005)
    os.kill(main, signal.SIGKILL)
    os._exit(0)


def _states() -> Iterator[Case]:
    kinds = {"manifest.json": "json", "state.json": "json", "tensors.safetensors": "safetensors"}
    for file, kind in kinds.items():
        for name, damage in {**ANY, **CONTENT[kind]}.items():
            for which in ("the newest", "all"):

                def make(file: str = file, damage: Callable[[Path], None] = damage, which: str = which) -> None:
                    found = sorted(Path("state/pretrain").rglob(f"step-*/{file}"))
                    assert found
                    for path in found if which == "all" else found[-1:]:
                        damage(path)

                yield Case(
                    fault=f"state: {file} of {which} is {name}", command="pretrain", make=make, right=EITHER, base="cut"
                )
    yield Case(fault="state: whole", command="pretrain", right=SAME, base="cut")
    for name in ("json", "txt"):
        stray = f"state/pretrain/{ENCODER}/runs/stray.{name}"
        make = lambda stray=stray: put(Path(stray), "junk")  # noqa: E731
        yield Case(fault=f"state: a stray file .{name}", command="pretrain", make=make, right=SAME, base="cut")


def cases() -> Iterator[Case]:
    """All of them."""
    for part in (_environment, _tracking, _disk, _meanwhile, _states):
        yield from part()
