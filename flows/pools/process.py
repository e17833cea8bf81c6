"""The work pool whose runs are processes of this machine, in this workspace."""

from __future__ import annotations

import sys
from typing import Any

from flows import pools
from flows.pools import Pool

TYPE = "process"


def template() -> dict[str, Any]:
    """How each process is started. Its folder is that of the deployment (prefect.yaml)."""
    return pools.fixed({"stream_output": True})


def pool() -> Pool:
    """The pool that `make serve` serves. The queue of shares is for other machines' workers alone."""
    return Pool(
        name=pools.PROCESS,
        kind=TYPE,
        template=template(),
        queues={pools.MACHINES: None},
        deployments=("pretrain-and-eval/local", "stage/process"),
        worker="worker",
        command=command(pools.DEFAULT),
    )


def command(queue: str, *options: str) -> tuple[str, ...]:
    """Starts a worker for one queue of the pool."""
    start = ("-m", "prefect", "--no-prompt", "worker", "start", "--pool", pools.PROCESS, "--type", TYPE)
    return (sys.executable, *start, "--work-queue", queue, *options)
