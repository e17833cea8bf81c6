"""Stages as flow runs of their own: started, cancelled, lost, refused. A thread stands in for Prefect's worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed

import flows.remote as module
from flows import automations, code, pools
from flows.pipeline import pretrain_and_eval
from flows.remote import Remote
from flows.stage import PREEMPTED, stage
from tasks.shared.operations.processes.dvc_runner import PreemptedStage, StageError
from tests import pipelines
from tests.paths import ROOT
from tests.pipelines import eventually, within


@pytest.fixture
def client(root: Path) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def deployment(client: SyncPrefectClient) -> Iterator[UUID]:
    """`stage/process`, whose runs no worker takes; made anew, so that it has none of another test's."""
    client.create_work_pool(WorkPoolCreate(name=pools.PROCESS, type="process"), overwrite=True)
    flow_id = client.create_flow(stage)
    deployment = client.create_deployment(flow_id=flow_id, name="process", work_pool_name=pools.PROCESS)
    yield deployment
    client.delete_deployment(deployment)


def _runs(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    """The runs of a deployment, the first first."""
    wanted = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
    return sorted(client.read_flow_runs(flow_run_filter=wanted), key=lambda run: str(run.created))


def _states(client: SyncPrefectClient, deployment: UUID) -> list[str]:
    return [run.state_name or "" for run in _runs(client, deployment)]


def _container(run: FlowRun) -> subprocess.Popen[bytes]:
    """What a worker starts for a run."""
    env = os.environ | {"PREFECT_API_URL": str(PREFECT_API_URL.value()), "PYTHONPATH": str(ROOT)}
    env |= {"PREFECT__FLOW_RUN_ID": str(run.id)}
    return subprocess.Popen([sys.executable, "-m", "flows.container"], env=env)


@contextmanager
def _meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Do something in a thread beside the body, which is over when the body is."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(60)
    assert not errors, errors


def test_a_fingerprint_depends_on_every_source_and_the_lock_and_a_worker_of_another_version_is_refused_in_one_line(
    tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = ["flows/a.py", "tasks/b/c.py", "deepclust/d.py", "requirements.lock"]
    found = {code.fingerprint(tmp_path / "code")}
    for file in files:
        path = tmp_path / "code" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        for content in (b"one", b"two"):
            path.write_bytes(content)
            found.add(code.fingerprint(tmp_path / "code"))
    (tmp_path / "code/flows/a.py").rename(tmp_path / "code/flows/z.py")
    found.add(code.fingerprint(tmp_path / "code"))
    assert len(found) == 2 * len(files) + 2

    state = stage("prepare", code="0" * 64, return_state=True)
    here = code.fingerprint()[:12]
    assert state.is_failed()
    assert (state.message or "").startswith(f"expected the flow's version of the code, 000000000000, got {here} in")
    assert "Traceback" not in caplog.text
    assert pipelines.ran(root) == []


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (Failed(message="a failed: a hole; mend it"), StageError, "a failed: a hole; mend it"),
        (Failed(name=PREEMPTED, message="told to stop"), PreemptedStage, "told to stop"),
        (Crashed(message="no heartbeat"), PreemptedStage, "no heartbeat"),
        (Cancelled(message="by hand"), StageError, "a was cancelled: by hand"),
    ],
)
def test_only_a_stage_that_was_preempted_or_lost_is_tried_again(
    state: State, error: type[StageError], message: str
) -> None:
    run = FlowRun(flow_id=uuid4(), state=state)
    with pytest.raises(StageError, match=message) as raised:
        module._outcome("a", run)
    assert type(raised.value) is error


def test_what_a_run_ended_as_is_what_became_of_its_stage(root: Path) -> None:
    (root / "metrics/embed").mkdir(parents=True)
    (root / "metrics/embed/a.json").write_text('{"dim": 3}')
    for name, what in (("Completed", "run"), ("Unchanged", "unchanged"), ("Restored", "restored")):
        run = FlowRun(flow_id=uuid4(), state=Completed(name=name), total_run_time=timedelta(seconds=7))
        outcome = module._outcome("embed@a", run)
        assert (outcome.what, outcome.seconds, outcome.metrics) == (what, 7, {"dim": 3})


def test_without_a_deployment_the_flow_fails_in_one_line_with_the_remedy(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = pretrain_and_eval(run_on="docker", return_state=True)
    assert state.is_failed()
    assert 'found none; make it: make serve ARGS="--docker", and export' in (state.message or "")
    assert "Traceback" not in caplog.text


def test_a_run_that_nobody_takes_is_said_and_cancelled_with_its_flow(
    client: SyncPrefectClient, deployment: UUID, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "UNCLAIMED", 0.1)

    def cancel() -> None:
        assert eventually(lambda: "is a worker running" in caplog.text, 60)
        task = client.read_task_run(_runs(client, deployment)[0].parent_task_run_id)
        client.set_flow_run_state(task.flow_run_id, Cancelling())

    with _meanwhile(cancel):
        state = pretrain_and_eval(stages=["prepare"], run_on="process", return_state=True)
    assert state.is_cancelled()
    assert _states(client, deployment) == ["Cancelled"]
    assert caplog.text.count("is a worker running") == 1


def test_a_cancelled_stage_ends_at_once_and_is_not_tried_again(
    root: Path, client: SyncPrefectClient, deployment: UUID
) -> None:
    (root / "slow").touch()
    run = client.create_flow_run_from_deployment(deployment, parameters={"name": "prepare"})
    with _container(run) as container:
        assert eventually((root / "state/asleep").exists, 120)
        client.set_flow_run_state(run.id, Cancelling())
        assert eventually(lambda: client.read_flow_run(run.id).state_name == "Cancelled", 15)
        assert container.wait(15) == 0
    assert not within(root)
    assert pipelines.ran(root) == ["prepare"]


def test_a_lost_stage_is_started_again_and_one_whose_flow_is_killed_ends(
    root: Path, client: SyncPrefectClient, deployment: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "slow").touch()
    monkeypatch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "flows.pipeline", "--stages", "prepare", "--run-on", "process"]
    begun = []
    with subprocess.Popen(command) as flow:
        try:
            for count in (1, 2):
                assert eventually(lambda count=count: len(_runs(client, deployment)) == count, 120)
                begun.append(_container(_runs(client, deployment)[-1]))
                assert eventually(lambda count=count: len(pipelines.ran(root)) == count, 120)
                if count == 1:
                    begun[0].kill()
                    assert eventually(lambda: len(within(root)) == 1, 30), "only the flow is left"
                    client.set_flow_run_state(_runs(client, deployment)[0].id, Crashed(), force=True)
            flow.kill()
            assert eventually(lambda: not within(root), 15)
            assert _states(client, deployment) == ["Crashed", "Cancelled"]
        finally:
            flow.kill()
            for container in begun:
                container.send_signal(signal.SIGTERM)
                container.wait(30)


def test_a_run_is_asked_for_once_the_server_knows_the_task_that_asks(
    client: SyncPrefectClient, deployment: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks, looks, created = uuid4(), [], []

    def read(_: object, number: UUID) -> Mock:
        looks.append(number)
        if len(looks) < 3:
            raise ObjectNotFound(Exception("404"))
        return Mock(id=number)

    def create(*_: object, parent_task_run_id: UUID, **__: object) -> None:
        created.append((parent_task_run_id, len(looks)))
        raise httpx.ConnectError("this is enough")

    monkeypatch.setattr(module, "POLL", 0.01)
    monkeypatch.setattr(module, "task_run", Mock(id=str(asks)))
    monkeypatch.setattr(SyncPrefectClient, "read_task_run", read)
    monkeypatch.setattr(SyncPrefectClient, "create_flow_run_from_deployment", create)
    with pytest.raises(StageError, match="this is enough"):
        Remote("process").run_stage("prepare", on_line=print)
    assert created == [(asks, 3)]


def test_a_stopped_remote_starts_nothing(client: SyncPrefectClient, deployment: UUID) -> None:
    remote = Remote("process")
    remote.stop()
    with pytest.raises(StageError, match="not started"):
        remote.run_stage("prepare", on_line=print)
    assert _runs(client, deployment) == []


def test_automations_for_lost_and_cancelled_runs_are_made_once_and_renewed(client: SyncPrefectClient) -> None:
    for make, name in (
        (automations.crash_on_lost_heartbeat, automations.LOST),
        (automations.end_cancelled, automations.CANCELLED),
    ):
        for seconds in (40, 120):
            make(client, seconds=seconds)
            found = client.read_automations_by_name(name)
            assert [automation.trigger.within for automation in found] == [timedelta(seconds=seconds)]
