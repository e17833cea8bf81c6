"""A stage that computes has its GPUs to itself, between real processes and threads; the list of GPUs is made up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tasks.shared.operations.processes import child_processes, gpus
from tasks.shared.operations.processes.dvc_runner import StageError, Workspace
from tests import pipelines
from tests.pipelines import eventually

GPUS = ["GPU-aa", "GPU-bb", "GPU-cc"]
_HOLD = f"""
import sys, time
from tasks.shared.operations.processes import gpus
gpus._listed = lambda: {GPUS}
with gpus.held_for("embed", stopped=lambda: False, on_wait=print) as held:
    print(held.env[gpus.VISIBLE], flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpus.FOLDER, str(tmp_path / "locks"))
    monkeypatch.setattr(gpus, "_listed", lambda: GPUS)
    for name in (gpus.VISIBLE, "PET_NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def _held(stack: ExitStack, stage: str = "pretrain") -> str:
    """What the stage gets at once."""
    impatient = {"stopped": lambda: True, "on_wait": lambda _: None}
    return stack.enter_context(gpus.held_for(stage, **impatient)).env.get(gpus.VISIBLE, "")


def test_stages_of_other_processes_have_gpus_of_their_own_until_they_die(stack: ExitStack) -> None:
    processes = []
    for _ in GPUS:
        other = subprocess.Popen([sys.executable, "-c", _HOLD], stdout=subprocess.PIPE, text=True)
        stack.callback(other.kill)
        processes.append(other)
    names = [process.stdout.readline().strip() for process in processes if process.stdout]
    assert sorted(names) == GPUS
    with pytest.raises(StageError, match="pretrain was stopped"):
        _held(stack)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait()
    assert _held(stack) == names[1]


def test_a_stage_that_outlives_its_flow_keeps_the_gpu(stack: ExitStack) -> None:
    with child_processes.ChildProcesses() as children:
        with gpus.held_for("embed", stopped=lambda: True, on_wait=print) as held:
            process = children.start(["sleep", "60"], hold=held.descriptors)
        assert len({_held(stack), _held(stack)}) == 2
        with pytest.raises(StageError):
            _held(stack)
        children.stop()
        assert process.poll() is not None
        assert _held(stack) == held.env[gpus.VISIBLE]


def test_two_that_want_all_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NPROC_PER_NODE", "gpu")
    got, waits = [], []

    def work() -> None:
        with gpus.held_for("pretrain", stopped=lambda: False, on_wait=waits.append) as held:
            got.append(held.env[gpus.VISIBLE])
            time.sleep(0.3)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: not any(thread.is_alive() for thread in threads), 20)
    assert got == ["GPU-aa,GPU-bb,GPU-cc"] * 3
    assert waits == ["pretrain waits for 3 of 3 GPUs, which others hold"] * 2


@pytest.mark.parametrize(
    ("chosen", "processes", "stage", "expected"),
    [
        ("1", "", "embed", "1"),
        ("GPU-c", "", "embed", "GPU-c"),
        ("2,0", "2", "pretrain", "2,0"),
        ("2,0", "gpu", "pretrain", "2,0"),
        ("1", "4", "pretrain", "1"),
        ("1", "gpu", "linear", "1"),
        ("", "gpu", "pretrain", ""),
        ("-1", "", "pretrain", ""),
        ("9", "", "pretrain", ""),
        ("0", "", "report", ""),
    ],
)
def test_only_what_the_user_allows_is_taken_under_the_users_names(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, chosen: str, processes: str, stage: str, expected: str
) -> None:
    monkeypatch.setenv(gpus.VISIBLE, chosen)
    monkeypatch.setenv("PET_NPROC_PER_NODE", processes)
    assert _held(stack, stage) == expected


def test_a_number_and_a_name_of_one_gpu_are_one_lock(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "1")
    assert _held(stack) == "1"
    monkeypatch.setenv(gpus.VISIBLE, "GPU-bb")
    with pytest.raises(StageError):
        _held(stack)


def test_without_a_gpu_or_its_driver_nothing_is_made(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv(gpus.FOLDER, str(tmp_path / "locks"))
    if gpus._listed():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv(gpus.VISIBLE, "0")
    assert _held(stack) == ""
    assert not (tmp_path / "locks").exists()


def test_a_flow_gives_a_gpu_to_a_stage_that_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipelines.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "stage.sh"
    script.write_text("echo $1 $CUDA_VISIBLE_DEVICES >>seen\n" + script.read_text())
    with Workspace() as workspace:
        for stage in ("prepare", "embed@random"):
            workspace.run_stage(stage, on_line=print)
    assert Path("seen").read_text().splitlines() == ["prepare", "random GPU-aa"]


@pytest.mark.parametrize("what", ["open", "link"])
def test_a_folder_that_others_can_write_to_is_refused(stack: ExitStack, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "locks"
    if what == "open":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        folder.symlink_to(tmp_path)
    with pytest.raises(StageError, match=r"expected .*locks to be a folder that only you can write to"):
        _held(stack)


def test_the_locks_are_of_this_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(gpus.FOLDER)
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = gpus._folder()
    assert folder == tmp_path / f"deepclust-gpus-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
