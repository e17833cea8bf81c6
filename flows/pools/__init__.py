"""Work pools: where runs of flows and stages are carried out. A caller decides nothing of how."""

from __future__ import annotations

from typing import Any

PROCESS = "deepclust"
DOCKER = "deepclust-docker"
KUBERNETES = "deepclust-kubernetes"
KUBERNETES_GPU = "deepclust-kubernetes-gpu"  # for what computes: the template of a pool is fixed, GPUs included

# Work queues. The first holds what computes: one stage at a time, so that it has the GPU to itself.
GPU = "gpu"
DEFAULT = "default"  # of every pool, made by Prefect
MACHINES = "machines"  # shares of stages that run on several machines; a machine's worker takes one at a time
COMPUTING = ("pretrain", "embed", "cluster", "linear", "adapt")


def fixed(configuration: dict[str, Any]) -> dict[str, Any]:
    """A base job template of which a run can set nothing: the server refuses any variable."""
    variables = {"type": "object", "properties": {}, "additionalProperties": False}
    return {"job_configuration": configuration, "variables": variables}
