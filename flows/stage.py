"""One stage as a flow of its own, for a container or another machine to run.

python -m flows.stage embed@swav
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import server, watchdog
from tasks.shared.operations import params
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.processes.dvc_runner import DeepclustError, Outcome, PreemptedStage, Workspace, check
from tasks.shared.operations.text import safe_lines

RETRIES = 5  # of a preempted stage
RETRY_SECONDS = 5.0  # before each


@flow(name="stage", persist_result=False)
def stage(name: str) -> State[Any]:
    """Run one stage, unless nothing it depends on has changed. The stages upstream of it must be up to date.

    Args:
        name: The stage as in DVC, such as `embed@swav`.
    """
    logger = get_run_logger()
    try:
        with watchdog.stages_run(), Workspace(alone=False) as workspace:
            values = params.load()  # before DVC reads the file
            if workspace.one(name) == "prepare":
                check(values)
            outcome = _run(workspace, name)
    except DeepclustError as error:
        message = safe_lines(str(error))
        logger.error("error: %s", message)
        return Failed(message=message)
    return Completed(message=f"{outcome.what} in {outcome.seconds:.1f} s", data=outcome.metrics)


def _run(workspace: Workspace, name: str) -> Outcome:
    """Run the stage, again if it is preempted. Prefect's retries of a flow would also repeat one that failed."""
    logger = get_run_logger()
    for _ in range(RETRIES):
        try:
            return workspace.run_stage(name, on_line=logger.info)
        except PreemptedStage as error:
            logger.warning("%s; trying again in %g s", error, RETRY_SECONDS)
        time.sleep(RETRY_SECONDS)
    return workspace.run_stage(name, on_line=logger.info)


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
