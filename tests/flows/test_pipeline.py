"""The flow: DVC's graph as task runs, and what it leaves behind, which is nothing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed

import flows.pipeline as module
from flows.pipeline import pretrain_and_eval
from flows.servers import server
from tasks.report import comparison, summary
from tasks.shared.operations import tracking
from tasks.shared.operations.processes.dvc_runner import Workspace
from tasks.shared.outputs import layout
from tests import pipelines
from tests.flows.conftest import preempt
from tests.paths import ROOT
from tests.pipelines import eventually, within


def _ended_as(state: State, **expected: str) -> bool:
    """Whether a flow run's task runs are these, as the server knows them a moment later."""
    flow = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        runs = partial(client.read_task_runs, flow_run_filter=flow)
        return eventually(lambda: {run.name: run.state_name for run in runs()} == expected, 20)


def test_each_stage_is_a_task_run_no_more_run_at_once_than_the_limit_and_a_second_run_starts_no_process(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened, closed = [], []
    monkeypatch.setattr(tracking, "open_pipeline", lambda *_: opened.append(True) or "parent")
    monkeypatch.setattr(tracking, "close_pipeline", lambda *what: closed.append(what))
    monkeypatch.setenv("DEEPCLUST_PARALLEL", "1")
    lines = "echo $DEEPCLUST_PARENT_RUN >>parents; [ ! -e busy ] || : >crowded\n"
    lines += "case $1 in pixels|random) : >busy; sleep 1; rm busy; esac\n"
    (root / "stage.sh").write_text(lines + (root / "stage.sh").read_text())
    state = pretrain_and_eval(return_state=True)
    assert state.is_completed()
    assert _ended_as(state, **dict.fromkeys(["prepare", "embed@pixels", "embed@random", "report"], "Completed"))
    assert not (root / "crowded").exists()
    assert (root / "parents").read_text() == "parent\n" * 4
    assert (opened, closed) == ([True], [("parent", "FINISHED")])
    assert comparison.comparison_text(comparison.with_costs(comparison.table())) in caplog.text
    rows = summary.comparison(layout.REPORT.parent / "comparison.csv")
    table = ["| pixels | baseline | .512 | – | – |", "| random | baseline | .250 | – | – |"]
    assert summary.markdown(rows).splitlines()[2:4] == table

    monkeypatch.setattr(Workspace, "run_stage", lambda *_, **__: pytest.fail("a process was started"))
    assert pretrain_and_eval(overrides=["embed.batch_size=9"], return_state=True).is_completed()
    assert "-  batch_size: 500" in caplog.text
    assert caplog.text.count("Finished in state Unchanged") == 4
    assert len(opened) == 1


def test_a_failed_stage_shows_its_tail_and_holds_up_only_what_needs_it(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "broken").touch()
    preempt(root, times=0)
    state = pretrain_and_eval(return_state=True)
    assert (state.is_failed(), state.message) == (True, "failed: embed@random")
    states = {"prepare": "Completed", "embed@pixels": "Completed", "embed@random": "Failed", "report": "NotReady"}
    assert _ended_as(state, **states)
    assert sorted(pipelines.ran(root)) == ["pixels", "prepare", "random"], "what fails is not tried again"
    summary_text = next(record.message for record in caplog.records if record.message.startswith("\nstage"))
    assert "embed@random failed: expected a whole, got a hole; mend it\n  | " in summary_text
    assert "not run, because a stage upstream failed: report" in summary_text
    assert "Traceback" not in caplog.text


def test_the_server_of_a_run_that_a_worker_started_is_watched_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[str] = []
    monkeypatch.setattr(server.watchdog, "watched", lambda url, _: watched.append(url) or nullcontext())
    pretrain_and_eval(encoders=["none"], return_state=True)
    assert not watched, "whoever calls the flow in a process of its own lives on"
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "any")
    pretrain_and_eval(encoders=["none"], return_state=True)
    assert watched == [PREFECT_API_URL.value()]


def test_the_summary_shows_no_password(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "open_pipeline", lambda *_: "")
    monkeypatch.setenv("DEEPCLUST_TRACKING", "on")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:1")
    assert pretrain_and_eval(stages=["prepare"], return_state=True).is_completed()
    assert "runs and models: http://***@127.0.0.1:1" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_preempted_stage_is_tried_again_begins_anew_once_and_fails_in_the_end(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.run_stage, "retry_delay_seconds", 0.1)
    monkeypatch.setattr(module, "RETRIES", 1)
    preempt(root, times=3)
    assert pretrain_and_eval(stages=["prepare"], return_state=True).is_failed()
    assert pretrain_and_eval(stages=["prepare"], force=True, return_state=True).is_completed()
    assert pipelines.ran(root) == ["prepare"] * 4
    assert (root / "resumes").read_text() == "prepare auto\nprepare auto\nprepare never\nprepare auto\n"
    assert "prepare was preempted: it was told to stop, and goes on when it is run again" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_mistake_is_one_line_and_nothing_runs_or_is_written(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (root / "params.yaml").read_bytes()
    for encoders, edit, message in (
        (["pixel"], "seed=5", "expected an encoder (pixels, random), got 'pixel'; did you mean pixels?"),
        ([], "adapt.domains=nowhere", "create it, or name another one: adapt.domains=path/to/images"),
    ):
        state = pretrain_and_eval(encoders=encoders, overrides=[edit], return_state=True)
        assert state.is_failed()
        assert (state.message or "").endswith(message)
    assert (root / "params.yaml").read_bytes() == before
    assert "Traceback" not in caplog.text
    assert pipelines.ran(root) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_an_ended_flow_leaves_no_process_behind_and_a_second_one_is_refused_in_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    (root / "slow").touch()
    monkeypatch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "flows.pipeline", "--stages", "prepare"]
    flow = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert eventually((root / "state/asleep").exists, 60)
    assert _main(monkeypatch)[0] == 2
    assert re.match(rf".*one already runs there \(process {flow.pid}\).*\n$", capsys.readouterr().err)
    (root / "state/prepare").mkdir()
    (root / "state/prepare/preempted").touch()  # as a stage does that the flow ends: it is not tried again
    flow.send_signal(number)
    flow.wait(30)
    assert eventually(lambda: not within(root), 10)
    assert (flow.returncode, pipelines.ran(root)) == (status, ["prepare"])
    assert not (root / "artifacts/prepare").exists()


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[object, Mock]:
    """The exit status of the command, and the flow that it called."""
    called = Mock(return_value=Completed(), description="", fn=pretrain_and_eval.fn)
    monkeypatch.setattr(sys, "argv", ["pretrain_and_eval", *arguments])
    monkeypatch.setattr(module, "pretrain_and_eval", called)
    with pytest.raises(SystemExit) as stop:
        module.main()
    return stop.value.code, called


def test_a_run_may_be_of_an_encoder_that_an_override_adds_and_a_folder_that_dvc_can_not_follow_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, "--encoders", "swav")[0] == 2
    status, called = _main(monkeypatch, "--override", "encoders=[pixels, swav]", "--encoders", "swav")
    assert (status, called.call_args.kwargs["encoders"]) == (0, ["swav"])
    capsys.readouterr()
    for words, message in (
        (["--stages", "embd"], r"expected a stage \(prepare, embed, report\), got 'embd'; did you mean embed\?"),
        (["--encoders", "../x"], r"expected an encoder \(pixels, random\), got '\.\./x'"),
        (["--override", "x"], "expected an override like .*, got 'x'"),
        (["--machines", "0"], "machines: input should be greater than or equal to 1, got '0'"),
        (["--run-on", "moon"], "run_on: input should be 'here', .*, got 'moon'"),
    ):
        assert _main(monkeypatch, *words)[0] == 2
        assert re.match(rf"error: .*{message}.*\n$", capsys.readouterr().err)
    for folder, remedy in (("~/x", "write it out, without `~`"), ("nowhere", "create it, or name")):
        status, called = _main(monkeypatch, "--override", "data.source=folder", f"data.folder={folder}")
        assert (status, called.called) == (2, False), "before the server starts"
        assert re.match(rf"error: data.folder: expected a .*{remedy}.*\n$", capsys.readouterr().err)
