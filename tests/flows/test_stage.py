"""One stage as a flow of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

import flows.stage as module
from flows.stage import stage
from tasks.shared.operations.processes.dvc_runner import Workspace
from tests import pipelines
from tests.flows.conftest import preempt


def test_one_stage_runs_and_gives_its_metrics_beside_the_flow_that_asked_for_it(root: Path) -> None:
    with Workspace():
        assert stage("prepare", return_state=True).is_completed()
        state = stage("embed@pixels", return_state=True)
    assert state.is_completed()
    assert state.result() == {"dim": 3}
    assert pipelines.ran(root) == ["prepare", "pixels"]


def test_a_preempted_stage_goes_on_and_a_failed_one_does_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.1)
    preempt(root, times=2)
    assert stage("prepare", return_state=True).is_completed()
    assert pipelines.ran(root) == ["prepare"] * 3
    (root / "broken").touch()
    assert stage("embed@random", return_state=True).is_failed()
    assert pipelines.ran(root) == ["prepare"] * 3 + ["random"]
