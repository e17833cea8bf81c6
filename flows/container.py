"""Carries out one flow run in this one process: what a worker starts, in a container or beside itself.

PREFECT__FLOW_RUN_ID=… python -m flows.container

Does what `python -m prefect.engine` does, but with the code of the current folder, so that nothing is to be pulled.
Prefect's own `prefect flow-run execute` needs three processes that each import Prefect. See docs/operations.md.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any
from uuid import UUID

from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.processes.dvc_runner import StageError

_FLOWS = {"stage": ("flows.stage", "stage"), "pretrain-and-eval": ("flows.pipeline", "pretrain_and_eval")}


def _run(run_id: UUID) -> None:
    from prefect._internal.control_listener import configure_from_env
    from prefect.client.orchestration import get_client
    from prefect.engine import handle_engine_signals
    from prefect.flow_engine import run_flow
    from prefect.states import Cancelled

    configure_from_env()  # by this, a worker on this machine says that it ends a run because it is cancelled
    with handle_engine_signals(run_id):
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(run_id)
            if run.state and run.state.is_final():  # it was given up, and this pod or container replaces its first one
                return
            if run.state and run.state.is_cancelling():  # before it began
                client.set_flow_run_state(run_id, Cancelled(message="cancelled before it began"))
                return
            name = client.read_flow(run.flow_id).name
        if name not in _FLOWS:
            raise StageError(f"expected a run of {' or '.join(_FLOWS)}, got one of {name!r}; mend its deployment")
        module, attribute = _FLOWS[name]
        flow: Any = getattr(importlib.import_module(module), attribute)
        run_flow(flow, flow_run=run, return_type="state")


def main() -> None:
    """Run the flow run of PREFECT__FLOW_RUN_ID; its state says how it ended, the status whether there is one."""
    # The first process of a container has no default handlers. Prefect installs its own when the run begins.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with errors_as_one_line():
        try:
            run_id = UUID(os.environ.get("PREFECT__FLOW_RUN_ID", ""))
        except ValueError:
            raise StageError(
                "expected PREFECT__FLOW_RUN_ID to be the id of a flow run; a worker sets it: start runs by "
                "`prefect deployment run`"
            ) from None
        _run(run_id)


if __name__ == "__main__":
    main()
