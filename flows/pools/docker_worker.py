"""The Docker pool's worker: Prefect's own, but for the containers' names, and for who removes one that has ended.

python -m flows.pools.docker_worker worker start --pool deepclust-docker --type docker

With `auto_remove` the engine does, at once, and Prefect's worker takes the exit status of one that is gone for 0: the
run of a container that was killed would go on for ever. So the container stays until the worker has read it.

A name that is taken gets a number from Prefect's worker, but only where the engine refuses it as Docker does. Podman's
answer is another one, and two isolated runs have stages of one name.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any
from uuid import uuid4

from docker.errors import APIError
from prefect_docker.worker import DockerWorker, DockerWorkerResult

warnings.filterwarnings("ignore", "Type 'Worker' at")  # takes the place of Prefect's, on purpose


class Worker(DockerWorker):  # type: ignore[misc]  # it has no types
    """Carries out each flow run of the pool in a container."""

    type = DockerWorker.type

    async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> DockerWorkerResult:
        """Carry out a run, until its container has ended and is removed."""
        result = await super().run(flow_run, configuration, task_status)
        with contextlib.closing(self._get_client()) as client, contextlib.suppress(APIError):
            client.containers.get(result.identifier.rpartition(":")[2]).remove(force=True)
        return result

    def _build_container_settings(self, docker_client: Any, configuration: Any) -> dict[str, Any]:
        settings: dict[str, Any] = super()._build_container_settings(docker_client, configuration)
        return settings | {"name": f"{settings['name']}-{uuid4().hex[:8]}"}


if __name__ == "__main__":
    from prefect.cli import app

    app()
