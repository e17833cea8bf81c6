"""torchrun as a library, on throw-away stages: who joins, who is lost, who ends on purpose, and what the user reads."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from deepclust.errors import ConfigError, PeerError
from tasks import environment, launch, layout
from tests.pipelines import eventually

ROOT = Path(__file__).resolve().parents[2]
_HEAD = """
import os, signal, sys, time
from pathlib import Path
from tasks import launch, layout, stage
if not launch.is_worker():
    with stage._marked_if_told_to_stop(layout.preempted("pretrain", "swav")):
        sys.exit(launch.start("body", sys.argv[1:]))
import torch
from deepclust import distributed
from deepclust.errors import ConfigError, DataError, PreemptedError
from tasks import preemption
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
    begin = time.monotonic()
    assert _run(here, body) == (2, "", "error: expected a, got b; mend it\n")
    assert time.monotonic() - begin < 20
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
    # As the leash does it: the launcher and, on its own, each of the others.
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
        launch._configuration("tasks.pretrain", ["swav"])
    assert message in str(caught.value)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    with pytest.raises(
        ConfigError, match="expected 1 to 1 processes, got 2; set it to `gpu`, or CUDA_VISIBLE_DEVICES="
    ):
        launch._configuration("tasks.pretrain", ["swav"])


def test_two_stages_at_once_meet_in_different_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # set by the call, and taken back by the test

    def meets(encoder: str) -> tuple[str, str]:
        config = launch._configuration("tasks.pretrain", [encoder])[0]
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
    assert launch.wanted(stage) is several


def _ended(status: int, line: str, error: BaseException) -> None:
    with pytest.raises(SystemExit) as stop:
        launch.end(status, line, error)
    assert stop.value.code == 0


@pytest.mark.parametrize("order", [lambda both: both, reversed], ids=["the peer first", "the peer last"])
def test_the_first_outcome_counts_and_a_peers_never_before_the_real_one(
    here: Path, monkeypatch: pytest.MonkeyPatch, order: Callable[[list[BaseException]], list[BaseException]]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("DEEPCLUST_OUTCOME", str(here / "outcome"))
    assert launch._read() is None
    for error in order([PeerError("another one"), ConfigError("mine")]):
        _ended(2, f"error: {error}", error)
        assert launch._read() is not None
    _ended(143, "preempted: too late", ConfigError("too late"))
    assert launch._read() == (2, "error: mine")
    assert sorted(path.name for path in here.glob("outcome*")) == ["outcome", "outcome.peer"]
