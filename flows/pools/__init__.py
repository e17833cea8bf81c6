"""Work pools: where runs of flows and stages are carried out. A caller decides nothing of how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.shared.operations.processes.gpus import COMPUTING as COMPUTING

PROCESS = "deepclust"
DOCKER = "deepclust-docker"
KUBERNETES = "deepclust-kubernetes"
KUBERNETES_GPU = "deepclust-kubernetes-gpu"  # for what computes: the template of a pool is fixed, GPUs included

# Work queues. The first holds what computes: one stage at a time, so that it has the GPU to itself.
GPU = "gpu"
DEFAULT = "default"  # of every pool, made by Prefect
MACHINES = "machines"  # shares of stages that run on several machines; a machine's worker takes one at a time

# Environment of our workers. The heartbeat, of which 30 s is the shortest, goes on to what they start.
WORKER = {"PREFECT_WORKER_QUERY_SECONDS": "0.5", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A work pool, and what belongs to it.

    Attributes:
        name: Of the pool.
        kind: Prefect's type of the pool.
        template: The base job template.
        queues: Its work queues, but for `default`, with how many runs may go on at once in each, None for any number.
        deployments: Those that run in it, of prefect.yaml, as `flow/deployment`.
        worker: Name of its worker in the background.
        command: Starts that worker; empty where none is started here.
    """

    name: str
    kind: str
    template: dict[str, Any]
    queues: Mapping[str, int | None] = field(default_factory=dict)
    deployments: tuple[str, ...] = ()
    worker: str = ""
    command: tuple[str, ...] = ()


def fixed(configuration: dict[str, Any]) -> dict[str, Any]:
    """A base job template of which a run can set nothing: the server refuses any variable."""
    variables = {"type": "object", "properties": {}, "additionalProperties": False}
    return {"job_configuration": configuration, "variables": variables}
