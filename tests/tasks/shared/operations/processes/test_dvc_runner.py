"""Stages run through DVC: its graph, its decisions, its lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zc.lockfile

from deepclust.errors import StageError
from tasks.shared.operations.processes import dvc_runner
from tasks.shared.operations.processes.dvc_runner import PreemptedStage, Workspace
from tasks.shared.outputs import layout
from tests import pipelines
from tests.pipelines import eventually, within


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pipelines.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def workspace(root: Path) -> Iterator[Workspace]:
    with Workspace(grace=1) as workspace:
        yield workspace


def _pretend(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a shell script in DVC's place."""
    monkeypatch.setattr(dvc_runner, "_DVC", ("sh", "-c", script, "dvc"))
    monkeypatch.setattr(dvc_runner, "_WAITS", (0.0, 0.0))


def test_the_graph_is_dvcs_and_targets_bring_their_ancestors(workspace: Workspace) -> None:
    assert workspace.graph == {
        "prepare": (),
        "embed@pixels": ("prepare",),
        "embed@random": ("prepare",),
        "report": ("embed@pixels", "embed@random"),
    }
    assert workspace.select() == ["prepare", "embed@pixels", "embed@random", "report"]
    assert workspace.select(["embed@random"]) == ["prepare", "embed@random"]
    assert workspace.select(["embed"]) == ["prepare", "embed@pixels", "embed@random"]
    assert [workspace.waiting_for(stage) for stage in workspace.graph] == [3, 1, 1, 0]
    with pytest.raises(StageError, match=r"got 'embed@pixel'; did you mean embed@pixels\?$"):
        workspace.select(["embed@pixel"])
    with pytest.raises(StageError, match="expected a single stage, got 'embed'; name one of"):
        workspace.one("embed")


def test_a_stage_runs_once_and_again_when_it_is_forced(workspace: Workspace, root: Path) -> None:
    seen: list[str] = []
    assert workspace.unchanged() == set()
    workspace.run_stage("prepare", on_line=seen.append)
    assert "> sh stage.sh prepare artifacts/prepare" in seen
    assert not any("git add" in line for line in seen)
    outcome = workspace.run_stage("embed@pixels", on_line=seen.append)
    assert (outcome.what, outcome.metrics) == ("run", {"dim": 3})
    assert workspace.unchanged() == {"prepare", "embed@pixels"}
    assert workspace.run_stage("prepare", on_line=seen.append).what == "unchanged"
    assert pipelines.ran(root) == ["prepare", "pixels"]
    lock = (root / "dvc.lock").read_bytes()
    assert workspace.run_stage("prepare", on_line=seen.append, force=True).what == "run"
    assert pipelines.ran(root) == ["prepare", "pixels", "prepare"]
    assert (root / "dvc.lock").read_bytes() == lock


def test_a_stage_below_a_changed_one_is_not_unchanged(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, """echo '{"prepare": [{"changed deps": {}}]}'""")
    assert workspace.unchanged() == set()
    _pretend(monkeypatch, """echo '{"embed@random": []}'""")
    assert workspace.unchanged() == {"prepare", "embed@pixels"}


def test_a_failure_carries_the_stages_own_error_and_its_tail(workspace: Workspace, root: Path) -> None:
    (root / "broken").touch()
    (root / "artifacts").mkdir()
    (root / "artifacts/prepare").touch()
    with pytest.raises(StageError) as caught:
        workspace.run_stage("embed@random", on_line=lambda _: None)
    first, *tail = str(caught.value).splitlines()
    assert first == "embed@random failed: expected a whole, got a hole; mend it"
    assert "  | > sh stage.sh random artifacts/embed/random" in tail
    assert tail[-1].startswith("  | ERROR: failed to reproduce 'embed@random'")


def test_a_stage_that_left_its_marker_is_preempted_and_an_old_marker_does_not_count(
    workspace: Workspace, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = layout.preempted("embed", "random")
    _pretend(monkeypatch, f"mkdir -p {marker.parent}; touch {marker}; exit 255")
    with pytest.raises(
        PreemptedStage, match=r"^embed@random was preempted: it was told to stop, and goes on when"
    ) as it:
        workspace.run_stage("embed@random", on_line=lambda _: None)
    assert "\n" not in str(it.value)
    assert marker.exists()
    _pretend(monkeypatch, "exit 255")
    with pytest.raises(StageError, match=r"^embed@random failed: exit status 255") as other:
        workspace.run_stage("embed@random", on_line=lambda _: None)
    assert not isinstance(other.value, PreemptedStage)


def test_a_stage_that_this_flow_stops_is_not_preempted(
    workspace: Workspace, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = layout.preempted("prepare")
    # The shell itself makes the file: a `touch` would be one more child that the group's second signal ends.
    _pretend(monkeypatch, f"mkdir -p {marker.parent}; trap ': >{marker}; exit 143' TERM; echo up; sleep 60 & wait")
    stop = threading.Timer(0, workspace.stop)

    def on_line(line: str) -> None:
        if line.strip() == "up":  # a shell says more when its child is stopped
            stop.start()

    with pytest.raises(StageError, match=r"^prepare was stopped$"):
        workspace.run_stage("prepare", on_line=on_line)
    stop.join()
    assert marker.exists()


def test_exactly_dvcs_lock_error_is_tried_again(
    workspace: Workspace, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = "ERROR: Unable to acquire lock. Most likely another DVC process is running or was terminated abruptly."
    _pretend(monkeypatch, f"echo x >>tries; [ $(wc -l <tries) = 3 ] || {{ echo '{locked}'; exit 255; }}")
    workspace.run_stage("prepare", on_line=lambda _: None)
    assert (root / "tries").read_text() == "x\nx\nx\n"
    _pretend(monkeypatch, "echo x >>other; echo 'ERROR: failed to reproduce'; exit 255")
    with pytest.raises(StageError, match=r"^prepare failed: failed to reproduce\n"):
        workspace.run_stage("prepare", on_line=lambda _: None)
    assert (root / "other").read_text() == "x\n"
    _pretend(monkeypatch, f"echo x >>forever; echo '{locked}'; exit 255")
    with pytest.raises(StageError, match="Unable to acquire lock"):
        workspace.run_stage("prepare", on_line=lambda _: None)
    assert (root / "forever").read_text() == "x\nx\nx\n"


def test_a_lock_that_is_held_longer_than_dvc_waits_costs_nothing(workspace: Workspace, root: Path) -> None:
    (root / ".dvc/tmp").mkdir()
    lock = zc.lockfile.LockFile(str(root / ".dvc/tmp/lock"))
    threading.Timer(5, lock.close).start()  # on its own, DVC gives up after three seconds
    begin = time.monotonic()
    assert workspace.run_stage("prepare", on_line=lambda _: None).what == "run"
    assert time.monotonic() - begin > 5


def test_a_second_flow_is_refused_in_one_line(workspace: Workspace) -> None:
    with pytest.raises(StageError, match=rf"one already runs there \(process {os.getpid()}\); wait for it or stop it$"):
        Workspace().__enter__()
    with Workspace(alone=False):
        pass


def test_an_unreadable_workspace_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Workspace() as workspace, pytest.raises(StageError, match="DVC can not read the pipeline in") as caught:
        workspace.select()
    assert "\n" not in str(caught.value)


def test_after_a_sigkill_nobody_begins_until_the_stages_are_gone(root: Path) -> None:
    (root / "slow").touch()
    code = (
        "from tasks.shared.operations.processes.dvc_runner import Workspace\n"
        "with Workspace(grace=1) as w: w.run_stage('prepare', on_line=print)"
    )
    flow = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    assert eventually((root / "state/asleep").exists)
    flow.send_signal(signal.SIGKILL)
    with pytest.raises(StageError, match=f"process {flow.pid}"):
        Workspace().__enter__()
    flow.wait()
    assert eventually(lambda: not within(root), 10)
    with Workspace():
        pass
    assert not (root / "artifacts/prepare").exists()
