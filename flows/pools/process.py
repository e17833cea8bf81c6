"""The work pool whose runs are processes of this machine, in this workspace."""

from __future__ import annotations

from typing import Any

TYPE = "process"


def template() -> dict[str, Any]:
    """What a run may decide of its process: not its command or environment, and an unknown variable is refused."""
    from prefect.workers.process import ProcessWorker

    template: dict[str, Any] = ProcessWorker.get_default_base_job_template()
    for name in ("command", "env"):
        del template["job_configuration"][name]
        del template["variables"]["properties"][name]
    template["variables"]["additionalProperties"] = False
    return template
