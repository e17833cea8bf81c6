"""Runs each stage as a flow run of its own, on the workers of another pool: in a process or a container.

remote = Remote("docker")
remote.run_stage("embed@swav", on_line=print)
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.runtime import task_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling
from prefect.utilities.urls import url_for

from flows import code, machines, pools
from flows.stage import PREEMPTED
from tasks.shared.operations import tracking
from tasks.shared.operations.processes import dvc_runner
from tasks.shared.operations.processes.dvc_runner import Outcome, PreemptedStage, StageError
from tasks.shared.operations.text import masked, safe
from tasks.shared.outputs import environment

POLL = 0.3  # seconds between two looks at a run's state
UNCLAIMED = 60.0  # seconds after which it is said that no worker has taken a run
PATIENCE = 300.0  # seconds without the server before the stage is given up
GOODBYE = 13.0  # seconds that the runs have to end when the flow is stopped: a stage saves its state in 8

_WHAT = {"Completed": "run", "Unchanged": "unchanged", "Restored": "restored"}


class Remote:
    """Runs stages by the deployment `stage/<where>`, in the workspace in the current folder, which its workers share.

    Args:
        where: `process`, `docker` or `kubernetes`.
        folder: Name of the isolated run in whose worktree the stages work; empty: the workspace itself.
        machines: Machines over which a stage is spread that can use several, one after the other.

    Attributes:
        slots: How many stages may be asked for at once.

    Raises:
        StageError: If the server has no such deployment.
    """

    def __init__(self, where: str, *, folder: str = "", machines: int = 1) -> None:
        # The work queues limit how many containers run at once; processes are on one machine.
        self.slots = environment.parallel() if where == "process" else 1000
        self._folder = folder
        self._machines = machines
        self._all_machines = threading.Lock()  # two stages that each have some of them would wait for ever
        self._code = code.fingerprint()
        self._stopped = threading.Event()
        self._guard = threading.Lock()
        self._running: dict[UUID, str] = {}
        self._deployment = _deployment(where, where)
        # A cluster's pools differ in their pods; elsewhere a queue says how many stages compute at once.
        self._computing = _deployment("kubernetes-gpu", where) if where == "kubernetes" else self._deployment
        self._queue = pools.GPU if where == "docker" else None

    def run_stage(
        self,
        stage: str,
        *,
        on_line: Callable[[str], None],
        force: bool = False,
        env: dict[str, str] | None = None,
    ) -> Outcome:
        """Run one stage and wait for its end, as `Workspace.run_stage` does.

        Args:
            stage: A stage of the graph; those upstream of it must be up to date.
            on_line: Receives what there is to say of the run. Its output is in its own log.
            force: Run even if nothing has changed.
            env: Whether to resume, and MLflow's parent run; nothing else reaches the stage.

        Raises:
            PreemptedStage: If the run was preempted, or is lost with its worker, container or machine.
            StageError: If the stage fails, is cancelled or can not be asked for, or this is stopped.
        """
        env = env or {}
        how = {
            "force": force,
            "resume": env.get("DEEPCLUST_RESUME", "auto"),
            "parent": env.get(tracking.PARENT, ""),
        }
        if self._machines == 1 or stage.partition("@")[0] not in machines.STAGES:
            return self._run(stage, stage, on_line, how)
        meeting, runs = uuid4().hex, [f"{stage} on machine {machine}" for machine in range(self._machines)]

        def share(machine: int) -> Outcome:
            place = {"machines": self._machines, "machine": machine, "meeting": meeting}
            return self._run(stage, runs[machine], on_line, how | place)

        with self._all_machines:
            try:
                return machines.run_together(
                    share, lambda machine: self._cancel(runs[machine]), self._machines, on_line=on_line
                )
            finally:
                shutil.rmtree(machines.MEETINGS / meeting, ignore_errors=True)

    def _run(self, stage: str, name: str, on_line: Callable[[str], None], how: dict[str, object]) -> Outcome:
        with get_client(sync_client=True) as client:
            run = self._start(client, stage, name, how)
            try:
                on_line(f"{stage}: run {run.name} in the pool {run.work_pool_name}, {url_for(run) or run.id}")
                run = self._ended(client, run, on_line)
            finally:
                with self._guard:
                    if not self._stopped.is_set():
                        self._running.pop(run.id, None)
        return _outcome(stage, run)

    def _start(self, client: SyncPrefectClient, stage: str, name: str, how: dict[str, object]) -> FlowRun:
        computes = stage.partition("@")[0] in pools.COMPUTING
        deployment, queue = (self._computing, self._queue) if computes else (self._deployment, None)
        try:
            parent = self._parent(client)
            with self._guard:
                if self._stopped.is_set():
                    raise StageError("not started, because the run is being stopped")
                run = client.create_flow_run_from_deployment(
                    deployment.id,
                    name=name,
                    parameters={"name": stage, "folder": self._folder, "code": self._code, **how},
                    parent_task_run_id=parent,
                    work_queue_name=pools.MACHINES if "meeting" in how else queue,
                )
                self._running[run.id] = name
        except httpx.HTTPError as error:
            why = masked(str(error).partition("\n")[0])
            raise StageError(f"{stage}: expected the server to take a run, got {why}; is it healthy?") from error
        return run

    def _parent(self, client: SyncPrefectClient) -> UUID | None:
        """The task run that asks, once the server knows it: it learns of task runs by events, late when it is busy."""
        if not task_run.id:
            return None
        parent, deadline = UUID(task_run.id), time.monotonic() + UNCLAIMED
        while time.monotonic() < deadline:
            try:
                return client.read_task_run(parent).id
            except ObjectNotFound:
                if self._stopped.wait(POLL / 3):
                    break
        return parent

    def _ended(self, client: SyncPrefectClient, run: FlowRun, on_line: Callable[[str], None]) -> FlowRun:
        """The run as it is at its end."""
        begin = answered = time.monotonic()
        said = False
        while not self._stopped.wait(POLL):
            try:
                run = client.read_flow_run(run.id)
                answered = time.monotonic()
            except ObjectNotFound as error:
                raise StageError(f"{run.name} was deleted on the server; run again") from error
            except httpx.HTTPError as error:
                if time.monotonic() - answered > PATIENCE:
                    raise StageError(f"{run.name}: expected the server to answer, it does not; run again") from error
                continue
            state = _state(run)
            if state.is_final():
                return run
            waits = state.is_scheduled() and time.monotonic() - begin > UNCLAIMED
            if waits and not said and not self._others(client, run):
                said = True
                on_line(
                    f"warning: {run.name}: for {UNCLAIMED:g} s no worker of the pool {run.work_pool_name} (queue "
                    f"{run.work_queue_name}) has taken this run, which goes on waiting; is a worker running (make "
                    "serve), and does the queue's limit leave room (prefect work-queue ls)?"
                )
        raise StageError(f"{run.name} was stopped")

    def _others(self, client: SyncPrefectClient, run: FlowRun) -> bool:
        """Whether another run of this flow is at work in the same queue, for which this one waits."""
        with self._guard:
            others = set(self._running) - {run.id}
        found = [client.read_flow_run(other) for other in others]
        return any(other.work_queue_id == run.work_queue_id and _state(other).is_running() for other in found)

    def _cancel(self, name: str) -> None:
        with self._guard, get_client(sync_client=True) as client:
            for run_id in [run_id for run_id, running in self._running.items() if running == name]:
                with contextlib.suppress(httpx.HTTPError, ObjectNotFound):
                    client.set_flow_run_state(run_id, Cancelling(message="another machine's share has ended"))

    def stop(self) -> None:
        """Cancel every run and wait until they have ended; none can be started afterwards."""
        with self._guard:
            self._stopped.set()
            running = self._running
            self._running = {}
        if not running:
            return
        deadline = time.monotonic() + GOODBYE
        with get_client(sync_client=True) as client:
            for run_id in running:
                with contextlib.suppress(httpx.HTTPError, ObjectNotFound):
                    client.set_flow_run_state(run_id, Cancelling(message="the flow is stopped"))
            while running and time.monotonic() < deadline:
                for run_id in list(running):
                    with contextlib.suppress(httpx.HTTPError, ObjectNotFound):
                        if _state(client.read_flow_run(run_id)).is_final():
                            del running[run_id]
                time.sleep(POLL)


def _deployment(name: str, where: str) -> DeploymentResponse:
    with get_client(sync_client=True) as client:
        try:
            return client.read_deployment_by_name(f"stage/{name}")
        except ObjectNotFound as error:
            option = f' ARGS="--{where}"' if where != "process" else ""
            raise StageError(
                f"expected the deployment stage/{name} at {masked(str(PREFECT_API_URL.value()))}, found none; "
                f"make it: make serve{option}, and export PREFECT_API_URL and PREFECT_API_AUTH_STRING as it says"
            ) from error


def _state(run: FlowRun) -> State:
    assert run.state, "the server gives every run one"
    return run.state


def _outcome(stage: str, run: FlowRun) -> Outcome:
    """What the end of a run says of its stage. Raises: as `Remote.run_stage`."""
    state = _state(run)
    message = safe(state.message or "no reason given").strip()
    if state.is_completed():
        seconds = run.total_run_time.total_seconds()
        return Outcome(stage, _WHAT.get(state.name or "", "run"), seconds, dvc_runner.metrics(stage))
    if state.name == PREEMPTED or state.is_crashed():  # even before it began: an engine or a worker may be overloaded
        raise PreemptedStage(f"{stage} was preempted or lost, and goes on when it is run again: {message}")
    if state.is_cancelled():
        raise StageError(f"{stage} was cancelled: {message}")
    raise StageError(message if message.startswith(stage) else f"{stage}: {message}")
