"""Stages run through DVC: its graph, its decisions, its lock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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
    with Workspace() as workspace:
        yield workspace


def _run(workspace: Workspace, *stages: str, force: bool = False) -> list[str]:
    """What came of each stage."""
    return [workspace.run_stage(stage, on_line=lambda _: None, force=force).what for stage in stages]


def test_the_graph_and_what_is_run_restored_unchanged_or_changed_are_dvcs(workspace: Workspace, root: Path) -> None:
    embeds = dict.fromkeys(("embed@pixels", "embed@random"), ("prepare",))
    assert workspace.graph == {"prepare": (), **embeds, "report": tuple(embeds)}
    assert workspace.select() == ["prepare", *embeds, "report"]
    assert workspace.select(["embed"]) == ["prepare", "embed@pixels", "embed@random"]
    assert workspace.select(["prepare", "embed"], ["random"]) == ["prepare", "embed@random"]
    assert workspace.select(encoders=["random"]) == ["prepare", "embed@random"], "report needs all encoders"
    assert workspace.select(["report"], ["random"]) == workspace.select()
    with pytest.raises(StageError, match=r"\(prepare, embed, report\), got 'embd'; did you mean embed\?$"):
        workspace.select(["embd"])
    with pytest.raises(StageError, match=r"got 'embed@pixel'; did you mean embed@pixels\?$"):
        workspace.one("embed@pixel")
    with pytest.raises(StageError, match="expected a single stage, got 'embed'; name one of"):
        workspace.one("embed")
    seen: list[str] = []
    assert workspace.run_stage("prepare", on_line=seen.append).what == "run"
    assert seen == ["Running stage 'prepare':", "> sh stage.sh prepare artifacts/prepare"]
    assert workspace.run_stage("embed@pixels", on_line=seen.append).metrics == {"dim": 3}
    assert _run(workspace, "embed@random", "report") == ["run", "run"]
    lock = (root / "dvc.lock").read_bytes()
    assert _run(workspace, "prepare") == ["unchanged"]
    assert _run(workspace, "prepare", force=True) == ["run"]
    assert (root / "dvc.lock").read_bytes() == lock
    (root / "artifacts/embed/pixels").unlink()
    assert _run(workspace, "embed@pixels") == ["restored"]
    assert pipelines.ran(root) == ["prepare", "pixels", "random", "report", "prepare"]
    for file, content, changed in (
        ("artifacts/prepare", "whole\n", []),
        ("metrics/embed/pixels.json", "{}", ["embed@pixels", "report"]),
        ("params.yaml", Path("params.yaml").read_text().replace("seed: 0", "seed: 1"), [*workspace.graph]),
    ):
        Path(file).unlink()  # what DVC linked is not written through
        Path(file).write_text(content)
        unchanged = workspace.unchanged()
        assert [stage for stage in workspace.graph if stage not in unchanged] == changed


def test_a_failure_carries_the_stages_own_error_and_its_tail_and_is_preemption_where_it_has_just_left_its_marker(
    workspace: Workspace, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "broken").touch()
    (root / "artifacts").mkdir()
    (root / "artifacts/prepare").touch()
    with pytest.raises(StageError) as caught:
        _run(workspace, "embed@random")
    first, *tail = str(caught.value).splitlines()
    assert first == "embed@random failed: expected a whole, got a hole; mend it"
    assert "  | > sh stage.sh random artifacts/embed/random" in tail
    assert tail[-1].startswith("  | ERROR: failed to reproduce 'embed@random'")
    marker = layout.preempted("embed", "random")
    monkeypatch.setattr(dvc_runner, "_REPRO", ("sh", "-c", f"mkdir -p {marker.parent}; touch {marker}; exit 1"))
    with pytest.raises(PreemptedStage, match=r"^embed@random was preempted: it was told to stop[^\n]*$"):
        _run(workspace, "embed@random")
    monkeypatch.setattr(dvc_runner, "_REPRO", ("sh", "-c", "exit 255"))
    with pytest.raises(StageError, match=r"^embed@random failed: exit status 255") as other:
        _run(workspace, "embed@random")
    assert not isinstance(other.value, PreemptedStage)
    loud = r"printf 'error: no remote at https://ann:s3cr3t@host\033[2J\n'; exit 1"
    monkeypatch.setattr(dvc_runner, "_REPRO", ("sh", "-c", loud))
    seen: list[str] = []
    with pytest.raises(StageError) as last:
        workspace.run_stage("embed@random", on_line=seen.append)
    assert seen == [line := r"error: no remote at https://***@host\x1b[2J"]
    assert str(last.value) == f"embed@random failed: {line.removeprefix('error: ')}\n  | {line}"


def test_a_stage_that_this_flow_stops_is_not_preempted(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = layout.preempted("prepare")
    # The shell itself makes the file: a `touch` would be one more child that the group's second signal ends.
    script = f"mkdir -p {marker.parent}; trap ': >{marker}; exit 143' TERM; sleep 60 & echo up; wait"
    monkeypatch.setattr(dvc_runner, "_REPRO", ("sh", "-c", script))
    stop = threading.Thread(target=workspace.stop)
    with pytest.raises(StageError, match=r"^prepare was stopped$"):  # a shell says more when its child is stopped
        workspace.run_stage("prepare", on_line=lambda line: stop.start() if line.strip() == "up" else None)
    stop.join()
    assert marker.exists()


def test_a_stage_takes_over_the_locks_that_a_killed_run_of_it_left_though_its_number_is_another_processs(
    workspace: Workspace, root: Path
) -> None:
    (root / ".dvc/tmp").mkdir(exist_ok=True)
    left = {"pid": os.getpid(), "cmd": f"{dvc_runner.repro.__file__} prepare run"}
    held = {"read": {}, "write": {str(root / "artifacts/prepare"): left}}
    (root / ".dvc/tmp/rwlock").write_text(json.dumps(held))
    assert _run(workspace, "prepare") == ["run"]


def test_a_stage_waits_for_another_dvc_process(workspace: Workspace, root: Path) -> None:
    (root / ".dvc/tmp").mkdir()
    with subprocess.Popen(["sleep", "1"]) as other:
        threading.Thread(target=other.wait).start()  # DVC ignores the lock of a process that is gone
        holder = {str(root / "artifacts/prepare"): {"pid": other.pid, "cmd": "dvc repro"}}
        (root / ".dvc/tmp/rwlock").write_text(json.dumps({"write": holder, "read": {}}))
        assert _run(workspace, "prepare") == ["run"]
        assert other.poll() == 0


def test_a_stage_waits_for_another_process_that_is_writing_dvcs_lock_file(workspace: Workspace, root: Path) -> None:
    from dvc.repo import Repo

    assert _run(workspace, "prepare") == ["run"]
    path = root / "dvc.lock"
    whole = path.read_bytes()
    with ThreadPoolExecutor(1) as pool:
        with Repo() as repo, repo.lock:
            path.write_bytes(b"")  # DVC empties the file first
            run = pool.submit(_run, workspace, "embed@pixels")
            time.sleep(5)
            assert not run.done()
            path.write_bytes(whole)
        assert run.result() == ["run"]


def test_after_a_sigkill_nobody_begins_until_the_stages_are_gone(root: Path) -> None:
    (root / "slow").touch()
    code = f"from {Workspace.__module__} import *\nwith Workspace() as w: w.run_stage('prepare', on_line=print)"
    flow = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    assert eventually((root / "state/asleep").exists)
    flow.send_signal(signal.SIGKILL)
    with pytest.raises(StageError, match=rf"one already runs there \(process {flow.pid}\); wait for it, stop it, or"):
        Workspace().__enter__()
    flow.wait()
    assert eventually(lambda: not within(root), 10)
    with Workspace(), Workspace(alone=False):
        pass
    assert not (root / "artifacts/prepare").exists()


def test_the_folders_of_images_that_have_changed_are_those_that_dvc_names(workspace: Workspace, root: Path) -> None:
    graph = (root / "dvc.yaml").read_text().replace("params: [seed]", "params: [seed]\n    deps: [data, domains, code]")
    (root / "dvc.yaml").write_text(graph)
    for folder in ("data", "domains", "code"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / "file").write_text("1")
    assert _run(workspace, "prepare") == ["run"]
    assert workspace.changed_data() == []
    for folder in ("code", "data"):
        (root / folder / "another").write_text("2")
    assert workspace.changed_data() == ["data"]
