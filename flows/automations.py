"""What the server does by itself. `make serve` makes the automations; making one again changes nothing."""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

LOST = "deepclust: lost runs are crashed"
FLOWS = ("pretrain-and-eval", "stage")  # others on the same server may have no heartbeats, or rarer ones
BEAT = "prefect.flow-run.heartbeat"  # every 30 seconds (flows/__init__.py), the shortest that Prefect takes
# Names of the states in which a run beats no more: Prefect's, and ours.
_ENDS = ("Completed", "Failed", "TimedOut", "Crashed", "Cancelling", "Cancelled", "Unchanged", "Restored", "Preempted")


def crash_on_lost_heartbeat(client: SyncPrefectClient, *, seconds: float = 120) -> None:
    """Let the server mark a run as crashed that has sent no heartbeat for so long: its worker or machine is lost."""
    automation = AutomationCore(
        name=LOST,
        description="The worker, container or machine of a run is lost when its heartbeats stop.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={BEAT},
            expect={BEAT, *(f"prefect.flow-run.{state}" for state in _ENDS)},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": ["flow"], "prefect.resource.name": list(FLOWS)}
            ),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=seconds),
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
    known = next(iter(client.read_automations_by_name(LOST)), None)
    if known is None:
        client.create_automation(automation)
    else:
        client.update_automation(known.id, automation)
