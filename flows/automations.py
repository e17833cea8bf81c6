"""What the server that PREFECT_API_URL names does by itself when something happens. Making one again changes nothing.

python -m flows.automations notify slack-webhook/alerts   tell by this notification block when a run ends badly
python -m flows.automations rerun                         run again when the data have changed
python -m flows.automations check                         have they? If so, tell the server: for cron
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.events.actions import ChangeFlowRunState, RunDeployment, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from flows.servers import server
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.processes.dvc_runner import StageError, Workspace
from tasks.shared.operations.text import say

FLOW = "pretrain-and-eval"
DEPLOYMENT = f"{FLOW}/local"
DATA_CHANGED = "deepclust.data.changed"
LOST = "deepclust: lost runs are crashed"
CANCELLED = "deepclust: cancelled runs end"
FLOWS = (FLOW, "stage")  # others on the same server may have no heartbeats, or rarer ones
BEAT = "prefect.flow-run.heartbeat"  # every 30 seconds (flows/__init__.py), the shortest that Prefect takes
# Names of the states in which a run beats no more: Prefect's, and ours.
_ENDS = ("Completed", "Failed", "TimedOut", "Crashed", "Cancelled", "Unchanged", "Restored", "Preempted")
_OF_EACH_RUN: dict[str, Any] = {
    "match": ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
    "match_related": ResourceSpecification({"prefect.resource.role": ["flow"], "prefect.resource.name": list(FLOWS)}),
    "for_each": {"prefect.resource.id"},
    "threshold": 1,
}
_BODY = "{{ flow_run.name }}: {{ flow_run.state.message }}\n{{ flow_run | ui_url }}"


def crash_on_lost_heartbeat(client: SyncPrefectClient, *, seconds: float = 120) -> None:
    """Let the server mark a run as crashed that has sent no heartbeat for so long: its worker or machine is lost."""
    automation = AutomationCore(
        name=LOST,
        description="The worker, container or machine of a run is lost when its heartbeats stop.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={BEAT},
            expect={BEAT, *(f"prefect.flow-run.{state}" for state in ("Cancelling", *_ENDS))},
            within=timedelta(seconds=seconds),
            **_OF_EACH_RUN,
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                state=StateType.CRASHED,
                message=f"no heartbeat for {seconds:g} s: the worker or its machine is lost",
                force=False,
            )
        ],
    )
    _make(client, automation)


def end_cancelled(client: SyncPrefectClient, *, seconds: float = 60) -> None:
    """Let the server end a run that is still being cancelled after so long.

    A run ends itself in 13 seconds at most. One that is cancelled while its worker starts it never gets to do so: it is
    refused the state Running, and nobody is left to say that it has ended.
    """
    automation = AutomationCore(
        name=CANCELLED,
        description="A run that was cancelled before it began has nobody to end it.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.Cancelling"},
            expect={f"prefect.flow-run.{state}" for state in _ENDS},
            within=timedelta(seconds=seconds),
            **_OF_EACH_RUN,
        ),
        actions=[
            ChangeFlowRunState(
                name="Cancelled",
                state=StateType.CANCELLED,
                message="cancelled before it began, or nothing was left of it",
                force=False,
            )
        ],
    )
    _make(client, automation)


def notify(client: SyncPrefectClient, block: str) -> str:
    """Let the server notify by a block when a run of the pipeline fails or crashes; the automation's name.

    Args:
        client: Of the server.
        block: Type and name of a notification block, as in `prefect block ls`: `slack-webhook/alerts`.

    Raises:
        StageError: If there is no such block.
    """
    kind, _, name = block.partition("/")
    try:
        found = client.read_block_document_by_name(name, kind)
    except ObjectNotFound as error:
        raise StageError(
            f"expected a notification block (TYPE/NAME, as in `prefect block ls`), got {block!r}; "
            "docs/operations.md says how to make one"
        ) from error
    trigger = EventTrigger(
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        match_related=ResourceSpecification({"prefect.resource.role": ["flow"], "prefect.resource.name": [FLOW]}),
        posture=Posture.Reactive,
        threshold=1,
    )
    subject = f"{FLOW}: {{{{ flow_run.state.name }}}}"
    action = SendNotification(block_document_id=found.id, subject=subject, body=_BODY)
    return _make(client, AutomationCore(name=f"deepclust: tell {block}", trigger=trigger, actions=[action]))


def rerun(client: SyncPrefectClient) -> str:
    """Let the server run the pipeline when `check` has found other data; the automation's name.

    Raises:
        StageError: If the deployment is not there.
    """
    try:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
    except ObjectNotFound as error:
        raise StageError(f"expected the deployment {DEPLOYMENT}, got none; make serve makes it") from error
    trigger = EventTrigger(expect={DATA_CHANGED}, posture=Posture.Reactive, threshold=1)
    action = RunDeployment(source="selected", deployment_id=deployment.id, parameters={}, job_variables=None)
    return _make(client, AutomationCore(name="deepclust: run again", trigger=trigger, actions=[action]))


def _make(client: SyncPrefectClient, automation: AutomationCore) -> str:
    if known := client.read_automations_by_name(automation.name):
        client.update_automation(known[0].id, automation)
    else:
        client.create_automation(automation)
    return automation.name


def check() -> list[str]:
    """Tell the server if folders of images are no longer what `prepare` has read; these folders.

    Raises:
        StageError: If a flow runs in the workspace, or DVC fails.
    """
    with Workspace() as workspace:
        changed = workspace.changed_data()
    if changed:
        emit_event(DATA_CHANGED, {"prefect.resource.id": "deepclust.data"}, payload={"folders": changed})
    return changed


def main() -> None:
    """Make an automation, or check the data."""
    parser = argparse.ArgumentParser(prog="python -m flows.automations", description="What the server does by itself.")
    commands = parser.add_subparsers(dest="command", required=True)
    told = commands.add_parser("notify", help="by a notification block, when a run fails or crashes")
    told.add_argument("block", help="its type and name, as in `prefect block ls`: slack-webhook/alerts")
    commands.add_parser("rerun", help="when the data have changed")
    commands.add_parser("check", help="tell the server if the data have changed; for cron")
    arguments = parser.parse_args()
    with errors_as_one_line():
        if not PREFECT_API_URL.value():
            raise StageError("expected PREFECT_API_URL to name a server, got nothing; make serve prints what to export")
        with server.configured(), get_client(sync_client=True) as client:
            if arguments.command == "check":
                say(f"changed: {', '.join(changed)}" if (changed := check()) else "nothing has changed")
            else:
                say(f"made: {notify(client, arguments.block) if arguments.command == 'notify' else rerun(client)}")


if __name__ == "__main__":
    main()
