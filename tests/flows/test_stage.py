"""One stage as a flow of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

import flows.stage as module
from flows.stage import stage
from tasks.shared.operations.processes.dvc_runner import Workspace
from tests import pipelines
from tests.flows.conftest import preempt


def test_a_stage_gives_its_metrics_beside_a_flow_goes_on_where_it_is_preempted_and_fails_at_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.1)
    preempt(root, times=2)
    (root / "broken").touch()
    with Workspace():
        assert stage("prepare", return_state=True).is_completed()
        assert stage("embed@pixels", return_state=True).result() == {"dim": 3}
        assert stage("embed@random", return_state=True).is_failed()
    assert pipelines.ran(root) == ["prepare", "prepare", "prepare", "pixels", "random"]
