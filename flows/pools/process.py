"""The work pool whose runs are processes of this machine, in this workspace."""

from __future__ import annotations

from typing import Any

from flows import pools

TYPE = "process"


def template() -> dict[str, Any]:
    """How each process is started. Its folder is that of the deployment (prefect.yaml)."""
    return pools.fixed({"stream_output": True})
