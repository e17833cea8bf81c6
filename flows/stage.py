"""One stage on its own: what a container or another machine runs for the whole pipeline.

python -m flows.stage embed@swav
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import server
from tasks.run import DeepclustError, Workspace
from tasks.stage import errors_as_one_line


@flow(name="stage", persist_result=False)
def stage(name: str) -> State[Any]:
    """Run one stage, unless nothing it depends on has changed. The stages upstream of it must be up to date.

    Args:
        name: The stage as in DVC, such as `embed@swav`.
    """
    logger = get_run_logger()
    try:
        with Workspace(alone=False) as workspace:
            outcome = workspace.run_stage(workspace.one(name), on_line=logger.info)
    except DeepclustError as error:
        logger.error("error: %s", error)
        return Failed(message=str(error))
    return Completed(message=f"{outcome.what} in {outcome.seconds:.1f} s", data=outcome.metrics)


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
