"""Work pools: where runs of flows and stages are carried out. A caller decides nothing of how."""

from __future__ import annotations

PROCESS = "deepclust"
DOCKER = "deepclust-docker"
KUBERNETES = "deepclust-kubernetes"

# Work queues. The first holds what computes: one stage at a time, so that it has the GPU to itself.
GPU = "gpu"
MACHINES = "machines"  # shares of stages that run on several machines; a machine's worker takes one at a time
COMPUTING = ("pretrain", "embed", "cluster", "linear", "adapt")
