"""torchrun as a library, on throw-away stages: who joins, who is lost, who ends on purpose, and what the user reads."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest

from deepclust import temporary
from deepclust.errors import ConfigError, PeerError, StageError
from tasks.shared.operations.processes import launcher, signals, worker
from tasks.shared.outputs import environment, layout
from tests.paths import ROOT
from tests.pipelines import eventually

_HEAD = """
import atexit, os, signal, sys, time
from pathlib import Path
from tasks.shared.operations.processes import launcher, preemption
from tasks.shared.outputs import layout, stage
if not launcher.is_worker():
    with stage._marked_if_told_to_stop(layout.preempted("pretrain", "swav")):
        sys.exit(launcher.start("body", sys.argv[1:]))
import torch
from deepclust import distributed
from deepclust.errors import ConfigError, PreemptedError
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with stage.running("pretrain") as here:
    rank = distributed.rank()
    (Path("started") / f"{attempt}-{rank}").touch()
    def collective(value=1.0):
        return distributed.all_sum(torch.tensor([float(value)])).item()
"""
MARKER = layout.preempted("pretrain", "swav")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "started").mkdir()
    for name in [name for name in os.environ if name.startswith(("PET_", "TORCHELASTIC_", "LOCAL_WORLD_SIZE"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _start(body: str, *, encoder: str = "swav", processes: int = 2, **variables: str) -> subprocess.Popen[str]:
    Path("body.py").write_text(_HEAD + textwrap.indent(body.strip(), "    "), encoding="utf-8")
    variables |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path.cwd()}", "PET_NPROC_PER_NODE": str(processes)}
    variables |= {"DEEPCLUST_TRACKING": "off", "DEEPCLUST_COLLECTIVE_SECONDS": "20", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "body.py", encoder]
    return subprocess.Popen(command, env=os.environ | variables, stdout=PIPE, stderr=PIPE, text=True)


def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=90)
    return process.returncode, out, error


def _started() -> list[str]:
    return sorted(path.name for path in Path("started").iterdir())


def _endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_only_the_main_process_speaks_and_writes_and_a_loss_after_the_end_repeats_nothing() -> None:
    body = """
if rank == 1:
    atexit.register(os.kill, os.getpid(), signal.SIGKILL)
print(f"{rank} of {distributed.processes()}, {torch.get_num_threads()} thread(s)")
here.metrics({"total": collective(rank + 1)})
if rank == 0:
    (here.folder / "whole").touch()
"""
    assert _end(_start(body, DEEPCLUST_THREADS="4")) == (0, "0 of 2, 2 thread(s)\n", "")
    assert Path("artifacts/pretrain/swav/whole").exists()
    assert '"total": 3.0' in Path("metrics/pretrain/swav.json").read_text()
    assert _started() == ["0-0", "0-1"]
    assert not MARKER.exists()


def test_one_process_that_is_lost_makes_all_begin_again_and_a_users_mistake_on_one_is_one_line() -> None:
    body = """
(Path("started") / f"begun-{attempt}-{launcher.has_begun()}").touch()
collective()
launcher.note_begun()
collective()
if attempt == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
collective()
if rank == 1:
    raise ConfigError("expected a, got b; mend it")
collective()
"""
    status, _, error = _end(_start(body))
    assert _started() == ["0-0", "0-1", "1-0", "1-1", "begun-0-False", "begun-1-True"], "state is forgotten once"
    assert status == 2
    assert "warning: a process was lost; all start again (1 of at most 3 times)\n" in error
    assert error.endswith("\nerror: expected a, got b; mend it\n")
    assert "Traceback" not in error
    assert not any(Path("artifacts/pretrain").iterdir())


def test_a_bug_keeps_its_traceback_and_ends_in_one_line() -> None:
    status, _, error = _end(_start("raise KeyError('a bug')", processes=1, PET_MAX_RESTARTS="0"))
    assert (status, error.count("KeyError: 'a bug'")) == (2, 1)
    assert "but process 0 of this machine ended by status 1 after 0 restarts; see" in error.splitlines()[-1]
    assert not MARKER.exists(), "the flow would try again what fails"


def test_a_signal_reaches_all_processes_which_save_and_tell_the_flow() -> None:
    body = """
with preemption.deferred() as told:
    while not collective(told()):
        time.sleep(0.05)
    time.sleep(0.5)
    (Path("started") / f"saved-{rank}").touch()
    raise PreemptedError("saved")
"""
    process = _start(body)
    assert eventually(lambda: len(_started()) == 2)
    time.sleep(0.5)
    # As the supervisor does it: the launcher and, on its own, each of the others.
    for told in [process, *psutil.Process(process.pid).children(recursive=True)]:
        told.send_signal(signal.SIGTERM)
    assert _end(process) == (143, "", "preempted: saved\n")
    assert _started()[2:] == ["saved-0", "saved-1"]
    assert MARKER.exists()


def test_a_machine_that_comes_makes_all_begin_again_and_ends_nothing() -> None:
    body = """
with preemption.deferred() as told:
    while distributed.processes() == 1:
        if told():
            raise PreemptedError("saved")
        time.sleep(0.05)
collective()
"""
    variables = {"PET_NNODES": "1:2", "PET_RDZV_ENDPOINT": _endpoint(), "PET_RDZV_CONF": "last_call_timeout=1"}
    variables |= {"PET_LOCAL_ADDR": "127.0.0.1"}
    first = _start(body, processes=1, **variables)
    assert eventually(lambda: _started() == ["0-0"])
    second = _start(body, processes=1, **variables)
    assert _end(first) == _end(second) == (0, "", "")
    assert _started() == ["0-0", "0-1"]
    assert not MARKER.exists()
    assert layout.out("pretrain", "swav").exists()


def test_a_run_that_finished_is_finished_though_told_to_stop_at_its_end_and_a_killed_launcher_takes_it_along() -> None:
    body = """
with preemption.deferred() as told:
    (Path("started") / f"waits-{os.getpid()}").touch()
    while not told():
        time.sleep(0.05)
"""
    Path("tmp").mkdir()
    temp = str(Path("tmp").resolve())
    killed, told = (_start(body, encoder=encoder, processes=1, TMPDIR=temp) for encoder in ("random", "swav"))
    assert eventually(lambda: len(_started()) == 3, 60)
    assert {path.name[:14] for path in Path("tmp").iterdir()} == {temporary.PREFIX}, "torchrun's logs are inside"
    (worker,) = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    assert eventually(lambda: not worker.is_running(), 5)
    killed.wait()
    assert len(list(Path("tmp").iterdir())) == 2
    with temporary.folder(Path("tmp")):
        assert len(list(Path("tmp").iterdir())) == 2, "the next start removes the killed one's"
    told.send_signal(signal.SIGTERM)
    assert _end(told) == (0, "", "")
    assert not any(Path("tmp").iterdir())
    assert not MARKER.exists()
    killed.communicate()


def test_variables_that_make_no_sense_and_machines_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    come = f"{(where := _endpoint())} within 2 s, fewer came; start the same line on the others, mend PET_NNODES"
    for variables, message in (
        ("PET_NPROC_PER_NODE=0", "PET_NPROC_PER_NODE: expected 1 to 1 processes, got 0; set it to `gpu`, or CUDA_VIS"),
        (f"PET_NPROC_PER_NODE={10**30}", f"PET_NPROC_PER_NODE: expected 1 to 1 processes, got {10**30}; set it"),
        (f"PET_NNODES={10**30} PET_RDZV_ENDPOINT={where}", "PET_NNODES: expected 1 to 10000 machines, got 1000000000"),
        (f"PET_RDZV_CONF=join_timeout={10**30}", "join_timeout is not 0 to 604800 seconds; mend or unset them"),
        (f"PET_RDZV_CONF=read_timeout={10**30}", "read_timeout is not 0 to 604800 seconds; mend or unset them"),
        ("PET_NNODES=2 PET_RDZV_ENDPOINT=a:99999999", "'a:99999999' must be an integer between 0 and 65536"),
        ("PET_RDZV_BACKEND=etcd", "PET_RDZV_BACKEND: expected c10d, got etcd; mend or unset it"),
        ("PET_NNODES=2 PET_RDZV_CONF=join_timeout=2 PET_RDZV_ENDPOINT=" + where, "expected 2 machines at " + come),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", "1")  # set by the call, and taken back by the test
            for setting in variables.split():
                patch.setenv(*setting.split("=", 1))
            with pytest.raises((ConfigError, StageError)) as caught:
                launcher._torchrun("tasks.pretrain", ["swav"])
        assert message in str(caught.value)


def test_the_main_process_is_heard_before_another_and_that_before_a_peer(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_leave", sys.exit)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("DEEPCLUST_LAUNCHER", str(here))
    heard = [worker.outcome()]
    told = (("0", PeerError("one")), ("1", ConfigError("two")), ("0", ConfigError("main")), ("0", OSError()))
    for rank, error in told:
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="0"):
            launcher.end(2, f"{error}", error)
        lines = (here / "outcomes").read_text()
        (here / "outcomes").write_text(lines + "[0, 2, half a li")
        heard.append(worker.outcome())
        (here / "outcomes").write_text(lines)
    assert [found and found.line for found in heard] == [None, "one", "two", "main", "main"]


@pytest.mark.parametrize(
    ("status", "told", "children", "stopped"),
    [
        (2, False, 0, True),
        (143, True, 1, True),
        (143, False, 0, True),  # torchrun waits for the machine that was told, which may be gone
        (143, True, 0, False),  # torchrun told the processes itself, and waits for a new group
        (0, False, 1, False),  # the work is done
    ],
)
def test_only_those_that_wait_in_vain_are_stopped_after_an_outcome(
    here: Path, monkeypatch: pytest.MonkeyPatch, status: int, told: bool, children: int, stopped: bool
) -> None:
    monkeypatch.setenv("DEEPCLUST_LAUNCHER", str(here))
    pauses, sent = iter(range(4)), []
    monkeypatch.setattr(signals, "came", [signal.SIGTERM] * told)
    monkeypatch.setattr(psutil.Process, "children", lambda _: [None] * children)
    worker._add_outcome(status, "")
    monkeypatch.setattr(time, "sleep", lambda _: next(pauses))
    monkeypatch.setattr(os, "kill", lambda _, number: sent.append(number))
    with contextlib.nullcontext() if stopped else pytest.raises(StopIteration):
        launcher._end_after_outcome(threading.Event())
    assert sent == [signal.SIGTERM] * stopped
