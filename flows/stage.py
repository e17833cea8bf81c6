"""One stage as a flow of its own, for a container or another machine to run.

python -m flows.stage embed@swav
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Any, Literal

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from flows import code as versions
from flows import isolated
from flows.machines import Meeting
from flows.schema import IsolatedName, Machines, OneStage, RunId
from flows.servers import server, watchdog
from tasks.shared.operations import params, tracking
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.processes.dvc_runner import (
    DeepclustError,
    Outcome,
    PreemptedStage,
    Workspace,
    check,
)
from tasks.shared.operations.text import safe_lines

RETRIES = 5  # of a preempted stage
RETRY_SECONDS = 5.0  # before each
PREEMPTED = "Preempted"  # name of the state of a run that was told to stop, and goes on in the next one
GRACE = 8.0  # seconds to write a checkpoint: `docker stop` kills a container after 10


def _run_name() -> str:
    given = flow_run.parameters
    share = f" on machine {given['machine']}" if given.get("machines", 1) > 1 else ""
    return f"{given['name']}{share}"


@flow(name="stage", flow_run_name=_run_name, persist_result=False)
def stage(
    name: OneStage,
    force: bool = False,
    resume: Literal["auto", "never"] = "auto",
    parent: RunId = "",
    folder: IsolatedName = "",
    code: RunId = "",
    machines: Machines = 1,
    machine: int = 0,
    meeting: RunId = "",
) -> State[Any]:
    """Run one stage, unless nothing it depends on has changed. The stages upstream of it must be up to date.

    Args:
        name: The stage as in DVC, such as `embed@swav`.
        force: Run it even if nothing has changed.
        resume: `never` begins anew where an earlier run left a checkpoint.
        parent: Id of the run in MLflow that groups the stages of a pipeline run.
        folder: Name of the isolated run in whose worktree to work; empty: the workspace itself.
        code: Fingerprint of the code of the flow that asks, which has checked parameters and name; empty: none asks.
        machines: Machines over which the stage is spread. Each has a run of its own.
        machine: Number of this one, from 0.
        meeting: Id by which they find each other.
    """
    logger = get_run_logger()
    server.watch_for_worker()
    env = ({tracking.PARENT: parent} if parent else {}) | ({"DEEPCLUST_RESUME": "never"} if resume == "never" else {})
    try:
        if code:
            versions.check(code)
        with (
            contextlib.chdir(isolated.folder(folder)),
            watchdog.stages_run(),
            watchdog.cancellable(),
            Workspace(alone=False, grace=GRACE) as workspace,
        ):
            if not code:  # else the flow that asks has looked at all this, which takes seconds
                values = params.load()  # before DVC reads the file
                if workspace.one(name) == "prepare":
                    check(values)
            if machines == 1:
                outcome = _run(workspace, name, force, env)
            else:
                share = Meeting(meeting, machines, machine)
                outcome = share.run(workspace, name, on_line=logger.info, force=force, env=env, grace=GRACE)
    except watchdog.CancelledRun as error:
        return Cancelled(message=str(error))
    except TerminationSignal:
        return Failed(name=PREEMPTED, message=f"{name} was told to stop; it goes on when it is run again")
    except DeepclustError as error:
        message = safe_lines(str(error))
        logger.error("error: %s", message)
        return Failed(name=PREEMPTED if isinstance(error, PreemptedStage) else "Failed", message=message)
    kind = None if outcome.what == "run" else outcome.what.capitalize()
    return Completed(name=kind, message=f"{outcome.what} in {outcome.seconds:.1f} s", data=outcome.metrics)


def _run(workspace: Workspace, name: str, force: bool, env: dict[str, str]) -> Outcome:
    """Run the stage, again if it is preempted. Prefect's retries of a flow would also repeat one that failed."""
    logger = get_run_logger()
    for _ in range(RETRIES):
        try:
            return workspace.run_stage(name, on_line=logger.info, force=force, env=env)
        except PreemptedStage as error:
            logger.warning("%s; trying again in %g s", error, RETRY_SECONDS)
        env = env | {"DEEPCLUST_RESUME": "auto"}
        time.sleep(RETRY_SECONDS)
    return workspace.run_stage(name, on_line=logger.info, force=force, env=env)


def main() -> None:
    """Run the flow here, on an embedded server if none is configured."""
    parser = argparse.ArgumentParser(prog="python -m flows.stage", description=stage.description)
    parser.add_argument("name", help="the stage as in DVC, such as embed@swav")
    arguments = parser.parse_args()
    with errors_as_one_line(), server.configured():
        state = stage(arguments.name, return_state=True)
    sys.exit(0 if state.is_completed() else 1)


if __name__ == "__main__":
    main()
