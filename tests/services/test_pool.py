"""The Docker pool on a real engine: how a container ended is known, and none is left."""

from __future__ import annotations

from typing import Any

from flows.pools.docker import LABEL
from tests.pipelines import eventually


def test_the_run_of_a_killed_container_is_crashed_and_the_container_is_removed(engine: Any, docker_served: Any) -> None:
    def containers() -> list[Any]:
        label = f"{LABEL}={docker_served.root}"
        return list(engine.client.containers.list(all=True, ignore_removed=True, filters={"label": label}))

    number = docker_served.start("stage/docker", name="sizes", force=True)
    assert eventually(lambda: bool(containers()), 60)
    (container,) = containers()
    environment = container.attrs["Config"]["Env"]
    assert f"PREFECT_API_AUTH_STRING={docker_served.auth}" in environment
    assert docker_served.auth not in " ".join(container.attrs["Config"]["Cmd"])
    root = str(docker_served.root)
    assert [mount["Source"] for mount in container.attrs["Mounts"] if mount["Type"] == "bind"] == [root]
    container.kill("SIGKILL")
    assert docker_served.ended(number)["state"]["type"] == "CRASHED"
    assert eventually(lambda: not containers(), 15)
