"""torchrun as a library, on throw-away stages: who joins, who is lost, who ends on purpose, and what the user reads."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from deepclust.errors import ConfigError, PeerError
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
    for name in [*os.environ]:
        if name.startswith(("PET_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _start(root: Path, body: str, **variables: str) -> subprocess.Popen[str]:
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    (root / "body.py").write_text(_HEAD + lines, encoding="utf-8")
    ours = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{root}",
        "DEEPCLUST_TRACKING": "off",
        "DEEPCLUST_COLLECTIVE_SECONDS": "20",
        "CUDA_VISIBLE_DEVICES": "",
        "PET_NPROC_PER_NODE": "2",
    }
    return subprocess.Popen(
        [sys.executable, "body.py", "swav"],
        env={**os.environ, **ours, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(root: Path, body: str, **variables: str) -> tuple[int, str, str]:
    process = _start(root, body, **variables)
    out, error = process.communicate(timeout=90)
    return process.returncode, out, error


def _started(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "started").iterdir())


def test_only_the_main_process_speaks_and_writes_and_a_loss_after_the_end_repeats_nothing(here: Path) -> None:
    body = """
if rank == 1:
    atexit.register(os.kill, os.getpid(), signal.SIGKILL)
print(f"{rank} of {distributed.processes()}, {torch.get_num_threads()} thread(s)")
here.metrics({"total": collective(rank + 1)})
if rank == 0:
    (here.folder / "whole").touch()
"""
    assert _run(here, body, DEEPCLUST_THREADS="4") == (0, "0 of 2, 2 thread(s)\n", "")
    assert (here / "artifacts/pretrain/swav/whole").exists()
    assert '"total": 3.0' in (here / "metrics/pretrain/swav.json").read_text()
    assert _started(here) == ["0-0", "0-1"]
    assert not MARKER.exists()


def test_one_process_that_is_lost_makes_all_start_again_and_the_state_is_forgotten_once(here: Path) -> None:
    body = """
(Path("started") / f"begun-{attempt}-{launcher.has_begun()}").touch()
collective()
launcher.note_begun()
collective()
if attempt == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
collective()
"""
    status, _, error = _run(here, body)
    assert status == 0, error
    assert _started(here) == ["0-0", "0-1", "1-0", "1-1", "begun-0-False", "begun-1-True"]
    assert "warning: a process was lost; all start again (1 of at most 3 times)\n" in error
    assert "Traceback" not in error
    assert (here / "artifacts/pretrain/swav").exists()


def test_a_users_mistake_on_one_process_is_one_line_and_no_second_attempt(here: Path) -> None:
    body = "if rank == 1:\n    raise ConfigError('expected a, got b; mend it')\ncollective()"
    assert _run(here, body) == (2, "", "error: expected a, got b; mend it\n")
    assert _started(here) == ["0-0", "0-1"]
    assert list((here / "artifacts/pretrain").iterdir()) == []


def test_a_bug_keeps_its_traceback_and_ends_in_one_line(here: Path) -> None:
    status, _, error = _run(here, "if rank == 1:\n    raise KeyError('a bug')\ncollective()", PET_MAX_RESTARTS="0")
    assert status == 2
    assert error.count("KeyError: 'a bug'") == 1
    assert error.splitlines()[-1] == (
        "error: expected the processes to finish, but process 1 of this machine ended by status 1 after 0 restarts; "
        "see above, mend it and run again"
    )
    assert not MARKER.exists(), "the flow would try again what fails"


def test_a_signal_reaches_all_processes_which_save_and_tell_the_flow(here: Path) -> None:
    body = """
with preemption.deferred() as told:
    while not collective(told()):
        time.sleep(0.05)
    time.sleep(0.5)
    (Path("started") / f"saved-{rank}").touch()
    raise PreemptedError("saved")
"""
    process = _start(here, body)
    assert eventually(lambda: len(_started(here)) == 2)
    time.sleep(0.5)
    # As the supervisor does it: the launcher and, on its own, each of the others.
    for told in [process, *psutil.Process(process.pid).children(recursive=True)]:
        told.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (143, "preempted: saved\n")
    assert _started(here)[2:] == ["saved-0", "saved-1"]
    assert MARKER.exists()


def test_a_killed_launcher_leaves_no_process_behind(here: Path) -> None:
    process = _start(here, "time.sleep(60)")
    assert eventually(lambda: len(_started(here)) == 2)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=30)
    assert eventually(lambda: not any(one.is_running() for one in workers), 5)


def test_a_rendezvous_that_nobody_joins_is_one_line_that_names_it(here: Path) -> None:
    where = f"127.0.0.1:{_free_port()}"
    variables = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": where, "PET_RDZV_CONF": "join_timeout=2"}
    assert _run(here, "", **variables)[::2] == (
        2,
        f"error: expected 2 machines at {where} within 2 s, fewer came; start the same line on the others, "
        "mend PET_NNODES, or wait longer: PET_RDZV_CONF=join_timeout=4\n",
    )


def test_a_machine_that_comes_makes_all_begin_again_and_ends_nothing(here: Path) -> None:
    body = """
with preemption.deferred() as told:
    while distributed.processes() == 1:
        if told():
            raise PreemptedError("saved")
        time.sleep(0.05)
collective()
"""
    variables = {
        "PET_NNODES": "1:2",
        "PET_NPROC_PER_NODE": "1",
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{_free_port()}",
        "PET_RDZV_CONF": "last_call_timeout=1",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }
    first = _start(here, body, **variables)
    assert eventually(lambda: _started(here) == ["0-0"])
    second = _start(here, body, **variables)
    for process in (first, second):
        out, error = process.communicate(timeout=90)
        assert (process.returncode, out, error) == (0, "", "")
    assert _started(here) == ["0-0", "0-1"]
    assert not MARKER.exists()
    assert (here / "artifacts/pretrain/swav").exists()


def test_a_run_that_finished_is_finished_though_told_to_stop_at_its_end(here: Path) -> None:
    body = """
with preemption.deferred() as told:
    (Path("started") / f"told-{rank}").touch()
    while not told():
        time.sleep(0.05)
"""
    process = _start(here, body)
    assert eventually(lambda: len(_started(here)) == 4)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")
    assert not MARKER.exists()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("PET_NPROC_PER_NODE=two", "PET_NPROC_PER_NODE=two: Unsupported nproc_per_node value: two; mend"),
        ("PET_NPROC_PER_NODE=0", "PET_NPROC_PER_NODE: expected 1 to 1 processes, got 0; set it to `gpu`, or CUDA_VIS"),
        ("PET_RDZV_BACKEND=etcd", "PET_RDZV_BACKEND: expected c10d, got etcd; mend or unset it"),
        ("PET_MAX_RESTARTS=x", "PET_MAX_RESTARTS=x: argument --max-restarts"),
        ("PET_NNODES=2", "PET_RDZV_ENDPOINT: expected host:port of the first machine where PET_NNODES=2, got nothing"),
        ("PET_NNODES=2 PET_RDZV_ENDPOINT=h:1 PET_RDZV_CONF=join_timeout=x", "invalid literal for int"),
    ],
)
def test_variables_that_make_no_sense_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variables: str, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for setting in variables.split():
        monkeypatch.setenv(*setting.split("=", 1))
    with pytest.raises(ConfigError) as caught:
        launcher._configuration("tasks.pretrain", ["swav"])
    assert message in str(caught.value)


def test_two_stages_at_once_meet_in_different_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # set by the call, and taken back by the test

    def meets(encoder: str) -> tuple[str, str]:
        config = launcher._configuration("tasks.pretrain", [encoder])[0]
        return config.rdzv_endpoint, config.run_id

    assert meets("swav")[0] == "localhost:0", "a free port"
    assert meets("swav")[1] != meets("swav")[1]
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_MASTER_ADDR", "first")
    assert meets("swav") == ("first:29400", "deepclust-tasks.pretrain-swav")
    assert meets("pcl") == ("first:29400", "deepclust-tasks.pretrain-pcl")


def test_only_where_the_environment_says_so_does_a_stage_become_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NNODES", "1:1")
    assert not launcher.wanted("pretrain")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    assert launcher.wanted("pretrain")
    assert not launcher.wanted("linear")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert not launcher.wanted("pretrain")


class _Left(Exception):
    """A process left."""


@pytest.fixture
def launched(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is one that a launcher started."""

    def leave(status: int) -> None:
        raise _Left(status)

    monkeypatch.setattr(worker, "_leave", leave)
    monkeypatch.setattr(signals, "came", [])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("DEEPCLUST_LAUNCHER", str(here))
    return here


def test_the_main_process_is_heard_before_another_and_that_before_a_peer(
    launched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker.outcome() is None
    for rank, error in (
        ("0", PeerError("one")),
        ("1", ConfigError("two")),
        ("0", ConfigError("main")),
        ("0", OSError()),
    ):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(_Left, match="0"):
            launcher.end(2, f"{error}", error)
    lines = (launched / "outcomes").read_text().splitlines(keepends=True)
    heard = []
    for count in (1, 2, 3, 4):
        (launched / "outcomes").write_text("".join(lines[:count]) + "[0, 2, half a li")
        found = worker.outcome()
        heard.append(found and found.line)
    assert heard == ["one", "two", "main", "main"]


def test_without_our_launcher_a_process_ends_by_its_status_even_in_a_group(
    launched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DEEPCLUST_LAUNCHER")
    with pytest.raises(_Left, match="2"):
        launcher.end(2, "error: mine", ConfigError("mine"))
    assert capsys.readouterr().err == "error: mine\n"


@pytest.mark.parametrize(
    ("order", "told", "status"), [(2, True, 143), (0, True, 2), (2, False, 2), (None, True, 143), (None, False, 0)]
)
def test_a_launcher_that_was_told_to_stop_says_so_unless_a_process_says_why(
    launched: Path, monkeypatch: pytest.MonkeyPatch, order: int | None, told: bool, status: int
) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException

    def torchrun(*_: object) -> None:
        if order is not None:
            (Path(os.environ["DEEPCLUST_LAUNCHER"]) / "outcomes").write_text(f'[{order}, 2, "", false]\n')
        if told:
            raise SignalException("told", signal.SIGTERM)

    monkeypatch.setattr(launcher, "_torchrun", torchrun)
    monkeypatch.setattr(launcher, "_end_after_outcome", lambda *_: None)
    monkeypatch.setattr(psutil.Process, "children", lambda _, **__: [])
    monkeypatch.setattr("logging.disable", lambda *_: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert launcher.start("tasks.pretrain", ["swav"]) == status


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
    launched: Path, monkeypatch: pytest.MonkeyPatch, status: int, told: bool, children: int, stopped: bool
) -> None:
    monkeypatch.setattr(signals, "came", [signal.SIGTERM] * told)
    monkeypatch.setattr(psutil.Process, "children", lambda _: [None] * children)
    worker._add_outcome(status, "")
    pauses = iter(range(4))
    monkeypatch.setattr(time, "sleep", lambda _: next(pauses))
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _, number: sent.append(number))
    ended = threading.Event()
    with contextlib.nullcontext() if stopped else pytest.raises(StopIteration):
        launcher._end_after_outcome(ended)
    assert (sent == [signal.SIGTERM], ended.is_set()) == (stopped, stopped)
