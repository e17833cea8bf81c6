"""torchrun as a library, on throw-away stages: who joins, who is lost, who ends on purpose, and what the user reads."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from deepclust.errors import ConfigError, PeerError
from tasks.shared.operations.processes import launcher, worker
from tasks.shared.outputs import environment, layout
from tests.paths import ROOT
from tests.pipelines import eventually

_HEAD = """
import os, signal, sys, time
from pathlib import Path
from tasks.shared.operations.processes import launcher, preemption
from tasks.shared.outputs import layout, stage
if not launcher.is_worker():
    with stage._marked_if_told_to_stop(layout.preempted("pretrain", "swav")):
        sys.exit(launcher.start("body", sys.argv[1:]))
import torch
from deepclust import distributed
from deepclust.errors import ConfigError, DataError, PreemptedError
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with stage.running("pretrain") as here:
    rank = distributed.rank()
    (Path("started") / f"{attempt}-{rank}").touch()
    def collective(value=1.0):
        return distributed.all_sum(torch.tensor([float(value)])).item()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "started").mkdir()
    (tmp_path / "resume").mkdir()
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
        cwd=root,
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


def test_two_processes_join_and_only_the_main_one_speaks_and_writes(here: Path) -> None:
    status, out, error = _run(
        here,
        """
print(f"{rank} of {distributed.processes()}, {torch.get_num_threads()} thread(s)")
total = collective(rank + 1)
here.metrics({"total": total})
if rank == 0:
    (here.folder / "whole").touch()
    time.sleep(0.5)
""",
        DEEPCLUST_THREADS="4",
    )
    assert (status, out, error) == (0, "0 of 2, 2 thread(s)\n", "")
    assert (here / "artifacts/pretrain/swav/whole").exists()
    assert '"total": 3.0' in (here / "metrics/pretrain/swav.json").read_text()
    assert not layout.preempted("pretrain", "swav").exists()


def test_one_process_that_is_lost_makes_all_start_again(here: Path) -> None:
    status, _, error = _run(
        here,
        """
collective()
launcher.note_begun()
if rank == 0:
    (Path("resume") / os.environ["DEEPCLUST_RESUME"]).touch()
if attempt == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
collective()
if rank == 0:
    (here.folder / "whole").touch()
""",
        DEEPCLUST_RESUME="never",
    )
    assert status == 0, error
    assert {path.name for path in (here / "resume").iterdir()} == {"never", "auto"}, "it goes on from what it saved"
    assert _started(here) == ["0-0", "0-1", "1-0", "1-1"]
    assert "warning: a process was lost; all start again (1 of at most 3 times)\n" in error
    assert "Traceback" not in error
    assert (here / "artifacts/pretrain/swav/whole").exists()


@pytest.mark.parametrize(
    "body",
    [
        "if rank == 1:\n    raise ConfigError('expected a, got b; mend it')\ncollective()",
        "with distributed.together():\n    if rank == 0:\n        time.sleep(1)\n"
        "        raise DataError('expected a, got b; mend it')",
    ],
    ids=["while the other waits for it", "while the other learns of it"],
)
def test_a_users_mistake_on_one_process_is_one_line_and_no_second_attempt(here: Path, body: str) -> None:
    assert _run(here, body) == (2, "", "error: expected a, got b; mend it\n")
    assert _started(here) == ["0-0", "0-1"]
    assert list((here / "artifacts/pretrain").iterdir()) == []


def test_a_bug_keeps_its_traceback_and_ends_in_one_line(here: Path) -> None:
    status, _, error = _run(here, "if rank == 1:\n    raise KeyError('a bug')\ncollective()", PET_MAX_RESTARTS="0")
    assert status == 2
    assert error.count("KeyError: 'a bug'") == 1
    assert _started(here) == ["0-0", "0-1"]
    assert error.splitlines()[-1] == (
        "error: expected the processes to finish, but process 1 of this machine ended by status 1 after 0 restarts; "
        "see above, mend it and run again"
    )
    assert "ChildFailedError" not in error
    assert not layout.preempted("pretrain", "swav").exists(), "the flow would try again what fails"


def test_a_signal_reaches_all_processes_which_save_and_tell_the_flow(here: Path) -> None:
    process = _start(
        here,
        """
with preemption.deferred() as told:
    while True:
        if collective(told()):
            time.sleep(0.5)
            (Path("started") / f"saved-{rank}").touch()
            raise PreemptedError("saved")
        time.sleep(0.05)
""",
    )
    assert eventually(lambda: len(_started(here)) == 2)
    time.sleep(0.5)
    # As the supervisor does it: the launcher and, on its own, each of the others.
    for told in [process, *psutil.Process(process.pid).children(recursive=True)]:
        told.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (143, "preempted: saved\n")
    assert _started(here)[2:] == ["saved-0", "saved-1"]
    assert layout.preempted("pretrain", "swav").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_launcher_that_is_ended_leaves_no_process_behind(here: Path, number: signal.Signals, status: int) -> None:
    process = _start(here, "time.sleep(60)")
    assert eventually(lambda: len(_started(here)) == 2)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (status, "")
    assert layout.preempted("pretrain", "swav").exists() == (number == signal.SIGINT)
    assert eventually(lambda: not any(worker.is_running() for worker in workers), 5)


def test_a_rendezvous_that_nobody_joins_is_one_line_that_names_it(here: Path) -> None:
    port = _free_port()
    variables = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}", "PET_RDZV_CONF": "join_timeout=3"}
    status, _, error = _run(here, "collective()", **variables)
    assert status == 2
    assert error == (
        f"error: expected 2 machines at 127.0.0.1:{port} within 3 s, fewer came; start the same line on the others, "
        "mend PET_NNODES, or wait longer: PET_RDZV_CONF=join_timeout=6\n"
    )


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PET_NPROC_PER_NODE": "two"}, "PET_NPROC_PER_NODE=two: Unsupported nproc_per_node value: two; mend"),
        ({"PET_NPROC_PER_NODE": "0"}, "PET_NPROC_PER_NODE: expected 1 or more processes, got 0; mend"),
        ({"PET_RDZV_BACKEND": "etcd"}, "PET_RDZV_BACKEND: expected c10d, got etcd; mend or unset it"),
        ({"PET_MAX_RESTARTS": "x"}, "PET_MAX_RESTARTS=x: argument --max-restarts"),
        (
            {"PET_NNODES": "2"},
            "PET_RDZV_ENDPOINT: expected host:port of the first machine where PET_NNODES=2, got noth",
        ),
        ({"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "h:1", "PET_RDZV_CONF": "join_timeout=x"}, "invalid literal for int"),
    ],
)
def test_variables_that_make_no_sense_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        launcher._configuration("tasks.pretrain", ["swav"])
    assert message in str(caught.value)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    with pytest.raises(
        ConfigError, match="expected 1 to 1 processes, got 2; set it to `gpu`, or CUDA_VISIBLE_DEVICES="
    ):
        launcher._configuration("tasks.pretrain", ["swav"])


def test_two_stages_at_once_meet_in_different_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # set by the call, and taken back by the test

    def meets(encoder: str) -> tuple[str, str]:
        config = launcher._configuration("tasks.pretrain", [encoder])[0]
        return config.rdzv_endpoint, config.run_id

    assert meets("swav")[0] == "localhost:0", "a free port"
    assert meets("swav")[1] != meets("swav")[1]
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "first:29400")
    assert meets("swav") == ("first:29400", "deepclust-tasks.pretrain-swav")
    assert meets("pcl") == ("first:29400", "deepclust-tasks.pretrain-pcl")
    monkeypatch.delenv("PET_RDZV_ENDPOINT")
    monkeypatch.setenv("PET_MASTER_ADDR", "master")
    assert meets("pcl")[0] == "master:29400"


@pytest.mark.parametrize(
    ("variables", "stage", "several"),
    [
        ({}, "pretrain", False),
        ({"PET_NPROC_PER_NODE": "1", "PET_NNODES": "1:1"}, "pretrain", False),
        ({"PET_NPROC_PER_NODE": "gpu"}, "embed", True),
        ({"PET_NNODES": "2"}, "cluster", True),
        ({"PET_NPROC_PER_NODE": "2"}, "linear", False),
        ({"PET_NPROC_PER_NODE": "2", "TORCHELASTIC_RUN_ID": "run"}, "pretrain", False),
    ],
)
def test_only_where_the_environment_says_so_does_a_stage_become_a_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], stage: str, several: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launcher.wanted(stage) is several


def _ended(status: int, line: str, error: BaseException) -> None:
    with pytest.raises(SystemExit) as stop:
        launcher.end(status, line, error)
    assert stop.value.code == 0


@pytest.fixture
def outcomes(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is one that a launcher started; where it and the others leave their outcomes."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("DEEPCLUST_OUTCOME", str(here / "outcome"))
    return here


@pytest.mark.parametrize("order", [lambda all: all, reversed], ids=["the weakest first", "the weakest last"])
def test_the_main_process_is_heard_before_another_and_that_before_a_peer(
    outcomes: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: Callable[[list[tuple[str, BaseException]]], list[tuple[str, BaseException]]],
) -> None:
    assert worker.outcome() is None
    for rank, error in order([("0", PeerError("another")), ("1", ConfigError("not all")), ("0", ConfigError("all"))]):
        monkeypatch.setenv("RANK", rank)
        _ended(2, f"error: {error}", error)
        assert worker.outcome() is not None
    _ended(143, "preempted: too late", ConfigError("too late"))
    assert worker.outcome() == (2, "error: all", False)
    assert sorted(path.name for path in outcomes.glob("outcome*")) == ["outcome.main", "outcome.other", "outcome.peer"]


@pytest.mark.parametrize(
    ("left", "told", "status"),
    [("peer", True, 143), ("main", True, 2), ("peer", False, 2), ("", True, 143), ("", False, 0)],
)
def test_a_launcher_that_was_told_to_stop_says_so_unless_a_process_says_why(
    monkeypatch: pytest.MonkeyPatch, left: str, told: bool, status: int
) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException

    def torchrun(*_: object) -> None:
        if left:
            path = Path(os.environ["DEEPCLUST_OUTCOME"]).with_suffix(f".{left}")
            path.write_text(json.dumps({"status": 2, "line": ""}))
        if told:
            raise SignalException("told", signal.SIGTERM)

    monkeypatch.setenv("DEEPCLUST_OUTCOME", "set by the call, and taken back by the test")
    monkeypatch.setattr(launcher, "_torchrun", torchrun)
    for name in ("_end_after_outcome", "_finished", "_kill_what_is_left"):
        monkeypatch.setattr(launcher, name, lambda *_: None)
    monkeypatch.setattr("logging.disable", lambda *_: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert launcher.start("tasks.pretrain", ["swav"]) == status


@pytest.mark.parametrize(
    ("status", "children", "finished", "stopped"),
    [
        (2, [], False, True),
        (143, ["one that waits"], False, True),
        (143, [], True, True),  # torchrun waits for machines that may be gone
        (143, [], False, False),  # it waits for a new group
        (0, ["one that ends"], True, False),
    ],
)
def test_only_those_that_wait_in_vain_are_stopped_after_an_outcome(
    outcomes: Path, monkeypatch: pytest.MonkeyPatch, status: int, children: list[str], finished: bool, stopped: bool
) -> None:
    worker._write(status, "")
    slept: list[float] = []
    signals: list[int] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) > 4:
            raise TimeoutError

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(os, "kill", lambda _, number: signals.append(number))
    monkeypatch.setattr(psutil.Process, "children", lambda _: children)
    waiting, ended = threading.Event(), threading.Event()
    if finished:
        waiting.set()
    with contextlib.nullcontext() if stopped else pytest.raises(TimeoutError):
        launcher._end_after_outcome(waiting, ended)
    assert (signals == [signal.SIGTERM], ended.is_set()) == (stopped, stopped)


def test_a_run_begins_anew_until_it_has_begun(outcomes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPCLUST_RESUME", "never")
    worker._never_only_once()
    assert os.environ["DEEPCLUST_RESUME"] == "never", "a process that was lost earlier has not cleared the old state"
    launcher.note_begun()
    worker._never_only_once()
    assert os.environ["DEEPCLUST_RESUME"] == "auto"


def test_without_our_launcher_a_process_ends_by_its_status_even_in_a_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(status: int) -> None:
        raise SystemExit(-status)

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setattr(worker, "_leave", leave)
    with pytest.raises(SystemExit) as stop:
        launcher.end(2, "error: mine", ConfigError("mine"))
    assert (stop.value.code, capsys.readouterr().err) == (-2, "error: mine\n")


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
    assert not layout.preempted("pretrain", "swav").exists()
    assert (here / "artifacts/pretrain/swav").exists()


def test_a_run_that_finished_is_finished_though_told_to_stop_at_its_end(here: Path) -> None:
    process = _start(
        here,
        """
with preemption.deferred() as told:
    collective()
    (Path("started") / f"told-{rank}").touch()
    while not told():
        time.sleep(0.05)
""",
    )
    assert eventually(lambda: len(_started(here)) == 4)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")
    assert not layout.preempted("pretrain", "swav").exists()
    assert (here / "artifacts/pretrain/swav").exists()


def test_a_process_that_is_lost_after_the_work_is_done_repeats_nothing(here: Path) -> None:
    body = """
import atexit
if rank == 1:
    atexit.register(os.kill, os.getpid(), signal.SIGKILL)
collective()
"""
    assert _run(here, body) == (0, "", "")
    assert _started(here) == ["0-0", "0-1"]
