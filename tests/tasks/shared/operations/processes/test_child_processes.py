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


def test_a_killed_holder_leaves_nothing_behind_nor_does_stopping_and_nothing_starts_afterwards(here: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER])
    assert eventually((here / "ready").exists)
    assert len(within(here)) == 4  # holder, supervisor, child, grandchild
    holder.kill()
    holder.wait()
    assert eventually(lambda: not within(here), 10)
    (here / "ready").unlink()
    children = ChildProcesses(grace=0.5)
    process = children.start([sys.executable, "-c", FAMILY])
    assert eventually((here / "ready").exists)
    children.stop()
    assert (within(here), process.returncode) == ([], 128 + signal.SIGTERM)
    with pytest.raises(StageError, match="is being stopped"):
        children.start(["true"])


def test_a_child_may_use_its_time_of_grace_and_a_killed_supervisor_takes_its_group_along(here: Path) -> None:
    saver = "trap 'sleep .5; : >saved; exit' TERM; : >ready; while :; do sleep .1; done"
    with ChildProcesses(grace=10) as children:
        process = children.start(["sleep", "60"])
        assert eventually(lambda: len(within(here)) == 2)
        process.kill()
        assert children.wait(process) == -signal.SIGKILL
        assert eventually(lambda: not within(here), 5)
        children.start(["sh", "-c", saver])
        assert eventually((here / "ready").exists)
    assert (here / "saved").exists()


def test_lines_come_whole_at_once_of_a_bar_the_last_state_and_what_is_left_in_the_background_ends(here: Path) -> None:
    seen: list[str] = []
    begin = time.monotonic()
    code = r"printf 'one\ntw'; sleep .1; printf 'ö\r\n\r 1%%\r 50%%\r100%%\r\nend\n\rleft 7%%'; sleep 60 & "
    with ChildProcesses(grace=1) as children:
        assert children.stream(["sh", "-c", code + "exit 3"], seen.append) == 3
        assert within(here) == []
        held = "import sys, time; print(sys.prefix); open('said', 'w'); time.sleep(60)"
        children.stream(["python", "-c", held], lambda line: (seen.append(line), children.stop()))
    assert seen == ["one", "twö", "100%", "end", "left 7%", sys.prefix]
    assert time.monotonic() - begin < 30
