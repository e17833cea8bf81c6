"""The Docker work pool: each run is a container of one image, with the workspace under its own path."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flows import pools
from flows.pools import Pool, environment
from tasks.shared.operations.processes import gpus
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.text import masked
from tasks.shared.outputs import layout

if TYPE_CHECKING:
    from docker import DockerClient

TYPE = "docker"
WORKER = "docker-worker"  # in the background
LABEL = "deepclust.workspace"  # of each container: by it `make stop` finds them
GRACE = 12  # seconds between SIGTERM and SIGKILL: a stage saves its state in 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all containers of the pool have in common.

    Attributes:
        workspace: Absolute path of the clone, the same in the containers.
        image: Name and tag of an image of the engine, or of a registry.
        gpus: `all` of the machine, or `none`.
        user: Number of user and group, `uid:gid`, who own the workspace.
        shared_memory: Size of /dev/shm, such as `8g`: loaders and several processes of a stage exchange data there.
        mounts: Folders outside of the workspace, `PATH` to read or `PATH:rw`, under the same path in the containers.
        network: Docker's network mode, `host` or a network's name.

    Raises:
        StageError: If an engine would refuse a value, or take it for something else.
    """

    workspace: Path
    image: str = "deepclust:latest"
    gpus: str = "none"
    user: str = ""
    shared_memory: str = "8g"
    mounts: tuple[str, ...] = ()
    network: str = "host"

    def __post_init__(self) -> None:
        if not self.user:
            owner = self.workspace.stat()
            object.__setattr__(self, "user", f"{owner.st_uid}:{owner.st_gid}")
        _expect(self.gpus in ("none", "all"), "--gpus", "none or all", self.gpus)
        _expect(_is(r"\w[\w.:/-]*(@sha256:[0-9a-f]{64})?", self.image), "--image", "name:tag", self.image)
        _expect(_is(r"\d{1,10}:\d{1,10}", self.user), "--user", "uid:gid, such as 1000:1000", self.user)
        _expect(_is(r"\d+[bkmg]", self.shared_memory), "--shared-memory", "a size such as 8g", self.shared_memory)
        _expect(_is(r"[\w.-]+", self.network), "--network", "host or a network's name", self.network)
        for path in (str(self.workspace), *self.mounts):
            folder = path.removesuffix(":rw")
            fits = Path(folder).is_absolute() and Path(folder).exists() and not re.search(r"[:,\n]|\{\{", folder)
            _expect(fits, "--mount", "an absolute path that exists, without `:`, `,` and `{{`", path)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """What a command line says that has `options` and --image; the workspace is the current folder."""
        return cls(
            workspace=Path.cwd(),
            image=arguments.image,
            gpus=arguments.gpus,
            user=arguments.user,
            shared_memory=arguments.shared_memory,
            mounts=tuple(arguments.mount),
            network=arguments.network,
        )


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Settings`, but --image, which other pools have too."""
    group = parser.add_argument_group("Docker")
    group.add_argument("--gpus", default=Settings.gpus, metavar="none|all", help="GPUs of each container (%(default)s)")
    group.add_argument("--user", default="", metavar="UID:GID", help="who runs (the workspace's owner)")
    group.add_argument("--shared-memory", default=Settings.shared_memory, metavar="SIZE", help="/dev/shm (%(default)s)")
    group.add_argument("--mount", action="append", default=[], metavar="PATH[:rw]", help="a folder outside, to read")
    group.add_argument("--network", default=Settings.network, help="Docker's network mode (%(default)s)")


def template(settings: Settings) -> dict[str, Any]:
    """How each container is started; a run can set nothing of it.

    The address and the credential of Prefect's server are not in it: the worker hands on its own.
    """
    create: dict[str, Any] = {
        "user": settings.user,
        "working_dir": str(settings.workspace),
        "shm_size": settings.shared_memory,
    }
    if settings.gpus == "all":
        create["device_requests"] = [{"count": -1, "capabilities": [["gpu", "compute", "utility"]]}]
    return pools.fixed(
        {
            "image": settings.image,
            # A local name is never looked up in a public registry, where anybody could have put something under it.
            "image_pull_policy": "IfNotPresent" if registry(settings.image) else "Never",
            "command": "python -m flows.container",
            "env": _environment(settings),
            "labels": {LABEL: str(settings.workspace)},
            "network_mode": settings.network,
            "volumes": [f"{settings.workspace}:{settings.workspace}", *map(_volume, settings.mounts)],
            "auto_remove": False,  # see docker_worker.py
            "stream_output": True,
            "container_create_kwargs": create,
        }
    )


def pool(settings: Settings, *, slots: int) -> Pool:
    """The pool that `make serve ARGS=--docker` serves.

    Args:
        settings: Of its containers.
        slots: How many stages that compute may run at once.
    """
    start = ("worker", "start", "--pool", pools.DOCKER, "--type", TYPE)
    return Pool(
        name=pools.DOCKER,
        kind=TYPE,
        template=template(settings),
        queues={pools.GPU: slots},
        deployments=("pretrain-and-eval/docker", "stage/docker"),
        worker=WORKER,
        command=(sys.executable, "-m", "flows.pools.docker_worker", "--no-prompt", *start),
    )


@contextlib.contextmanager
def engine() -> Iterator[DockerClient]:
    """The container engine that DOCKER_HOST names, or this machine's.

    Raises:
        StageError: If none answers.
    """
    import docker
    from docker.errors import DockerException

    where = os.environ.get("DOCKER_HOST") or "/var/run/docker.sock"
    try:
        client = docker.from_env(timeout=60)
        client.ping()
    except (DockerException, OSError, ValueError) as error:
        raise StageError(_no_engine(where, error)) from error
    try:
        yield client
    finally:
        client.close()


def _no_engine(where: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "Permission denied" in text:
        got = "no permission"
        remedy = "join its group (it makes you root: docs/security.md), or use an engine of your own without root"
    elif "FileNotFoundError" in text or "No such file" in text:
        got, remedy = "nothing there", "start the engine, or name its socket: DOCKER_HOST=unix:///path/to/docker.sock"
    elif "refused" in text:
        got, remedy = "no answer", "start the engine, or mend DOCKER_HOST"
    else:
        got, remedy = masked(text)[:200], "start the engine, or mend DOCKER_HOST"
    return f"expected a container engine at {masked(where)}, got {got}; {remedy}"


def _environment(settings: Settings) -> dict[str, str]:
    # An engine with NVIDIA's runtime would give all GPUs to an image that asks for them.
    locks = str(settings.workspace / layout.STATE / "gpus")
    gpu = {"NVIDIA_VISIBLE_DEVICES": "void"} if settings.gpus == "none" else {gpus.FOLDER: locks}
    return environment.container() | gpu


def registry(image: str) -> str:
    """The host in an image's name, empty for a local one."""
    host, slash, _ = image.partition("/")
    return host if slash and host != "localhost" and re.search(r"[.:]", host) else ""


def _volume(mount: str) -> str:
    folder = mount.removesuffix(":rw")
    return f"{folder}:{folder}" + ("" if mount.endswith(":rw") else ":ro")


def _is(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text, re.ASCII) is not None


def _expect(fits: bool, option: str, expected: str, got: str) -> None:
    if not fits:
        raise StageError(f"{option}: expected {expected}, got {got!r}; mend it")


def end_containers(workspace: Path) -> int:
    """End what runs in containers of the workspace, with time to save its state, and remove them; how many there were.

    Raises:
        StageError: If there is no engine.
    """
    from docker.errors import APIError

    with engine() as client:
        found = client.containers.list(all=True, ignore_removed=True, filters={"label": f"{LABEL}={workspace}"})
        for container in found:
            with contextlib.suppress(APIError):  # it has ended meanwhile
                container.kill("SIGTERM")
        for container in found:
            with contextlib.suppress(APIError):
                container.stop(timeout=GRACE)
            with contextlib.suppress(APIError):  # the worker was faster
                container.remove(force=True)
    return len(found)
