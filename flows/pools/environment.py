"""The environment of a container, fixed when its pool is made."""

from __future__ import annotations

import os

from flows import pools
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.text import masked
from tasks.shared.outputs.environment import QUIET

# What is set for the pipeline where the pool is made, but for what belongs to a single run.
_HANDED_ON = (
    *("DEEPCLUST_PARALLEL", "DEEPCLUST_THREADS", "DEEPCLUST_COLLECTIVE_SECONDS", "DEEPCLUST_TRACKING"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
)


def container() -> dict[str, str]:
    """The variables of every container.

    Raises:
        StageError: If an address has a password in it, which whoever may see the pool could read.
    """
    handed_on = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
    for name, value in handed_on.items():
        if masked(value) != value:
            raise StageError(f"{name}: expected an address without a password, got {masked(value)!r}; take it out")
    return {
        **QUIET,
        **handed_on,
        "HOME": "/tmp",  # for a user who has none in the image
        "USER": "deepclust",  # a user without an entry in the image's /etc/passwd has no name
        "PREFECT_HOME": "/tmp/prefect",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": pools.WORKER["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"],
    }
