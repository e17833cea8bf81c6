"""Child processes never outlive their holder, whatever ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepclust.errors import StageError
from tasks.shared.operations.processes.child_processes import ChildProcesses
from tests.pipelines import eventually, within

# A child that ignores SIGTERM, with a child of its own in another session, as torchrun has them.
FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
open("ready", "w").close()
time.sleep(60)
"""
HOLDER = f"""
import sys, time
from tasks.shared.operations.processes.child_processes import ChildProcesses
ChildProcesses(grace=0.5).start([sys.executable, "-c", {FAMILY!r}])
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_killed_holder_leaves_nothing_behind(here: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER])
    assert eventually((here / "ready").exists)
    assert len(within(here)) == 4  # holder, supervisor, child, grandchild
    holder.kill()
    holder.wait()
    assert eventually(lambda: not within(here), 10)


def test_stopping_ends_the_whole_family_and_nothing_starts_afterwards(here: Path) -> None:
    children = ChildProcesses(grace=0.5)
    process = children.start([sys.executable, "-c", FAMILY])
    assert eventually((here / "ready").exists)
    children.stop()
    assert within(here) == []
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(StageError, match="is being stopped"):
        children.start(["true"])


def test_a_child_may_use_its_time_of_grace(here: Path) -> None:
    saver = "trap 'sleep .5; : >saved; exit' TERM; : >ready; while :; do sleep .1; done"
    with ChildProcesses(grace=10) as children:
        children.start(["sh", "-c", saver])
        assert eventually((here / "ready").exists)
    assert (here / "saved").exists()


def test_what_a_command_leaves_in_the_background_ends_with_it(here: Path) -> None:
    with ChildProcesses(grace=1) as children:
        begin = time.monotonic()
        assert children.stream(["sh", "-c", "sleep 60 & exit 3"], print) == 3
        assert time.monotonic() - begin < 10
        assert within(here) == []


def test_a_killed_supervisor_takes_its_group_along(here: Path) -> None:
    with ChildProcesses() as children:
        process = children.start(["sleep", "60"])
        assert eventually(lambda: len(within(here)) == 2)
        process.kill()
        assert children.wait(process) == -signal.SIGKILL
        assert eventually(lambda: not within(here), 5)


def test_python_is_this_interpreter_and_output_is_not_held_back() -> None:
    seen: list[tuple[float, str]] = []
    with ChildProcesses() as children:
        code = "import sys, time; print(sys.prefix); time.sleep(1); print('end')"
        assert children.stream(["python", "-c", code], lambda line: seen.append((time.monotonic(), line))) == 0
    assert [line for _, line in seen] == [sys.prefix, "end"]
    assert seen[1][0] - seen[0][0] > 0.5


def test_lines_come_whole_and_of_a_progress_bar_only_the_last_state() -> None:
    seen: list[str] = []
    code = r"printf 'one\ntw'; sleep .1; printf 'ö\r\n\r 1%%\r 50%%\r100%%\r\nend\n\rleft 7%%'"
    with ChildProcesses() as children:
        assert children.stream(["sh", "-c", code], seen.append) == 0
    assert seen == ["one", "twö", "100%", "end", "left 7%"]
