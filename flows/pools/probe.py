"""One short container with the pool's configuration, before a run needs one: what is wrong is said in one line."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import warnings
from pathlib import Path
from typing import Any
from uuid import uuid4

from docker import DockerClient
from docker.errors import DockerException, ImageNotFound
from docker.models.containers import Container
from docker.models.images import Image
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect_docker.worker import DockerWorkerJobConfiguration

from flows.pools import docker
from flows.pools.docker import Settings
from flows.pools.docker_worker import Worker
from flows.servers import server
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.text import safe, warn

LOCK_LABEL = "deepclust.lock"  # of an image: SHA-256 of the requirements.lock that is installed in it
_LOCK = Path("requirements.lock")
_SECONDS = 120  # for a container to start and look around


def _look_around() -> None:
    """Runs in the container, by itself: prints what it finds as one line of JSON."""
    import json
    import os
    import sys
    import urllib.error
    import urllib.request
    from pathlib import Path

    written = [".", ".dvc", ".git", "artifacts", "metrics", "plots", "state"]
    found = {
        "workspace": Path("dvc.yaml").exists(),
        "unwritable": [name for name in written if Path(name).exists() and not os.access(name, os.W_OK)],
        "gpus": len([*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]),
        "server": "",
        "status": 0,
    }
    password = urllib.request.HTTPPasswordMgrWithPriorAuth()
    user, _, secret = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    url = os.environ["PREFECT_API_URL"]
    password.add_password(None, url, user, secret, is_authenticated=bool(user))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPBasicAuthHandler(password))
    try:
        with opener.open(url + "/admin/version", timeout=10) as reply:
            found["status"] = reply.status
    except urllib.error.HTTPError as error:
        found["status"] = error.code
    except OSError as error:
        found["server"] = str(getattr(error, "reason", error))
    sys.stdout.write(json.dumps(found))


def check(settings: Settings, url: str, auth: str | None) -> str:
    """Try the pool's configuration on the engine. Returns what a container finds there, in a few words.

    Args:
        settings: Of the pool.
        url: Prefect's API, `…/api`.
        auth: The string that it asks for.

    Raises:
        StageError: If the runs of the pool could not work.
    """
    with docker.engine() as client:
        _check_image(client, settings)
        found = _find(client, settings, url, auth)
    where = f"in a container of {settings.image} as user {settings.user}"
    if not found["workspace"]:
        raise StageError(
            f"expected the workspace at {settings.workspace} {where}, got another folder; the engine has to run on a "
            "machine that has the workspace under the same path: mend DOCKER_HOST"
        )
    if found["unwritable"]:
        raise StageError(
            f"expected to write to {', '.join(found['unwritable'])} of {settings.workspace} {where}, got no "
            "permission; name the user who owns all of it, --user UID:GID, or give it to this one with chown -R"
        )
    if settings.gpus != "none" and not found["gpus"]:
        raise StageError(_no_gpu(settings, "none"))
    _check_server(settings, url, where, found)
    return f"user {settings.user}, {found['gpus']} GPUs"


def _check_image(client: DockerClient, settings: Settings) -> None:
    """That there is the image, and with the dependencies of this workspace's lock."""
    try:
        image = client.images.get(settings.image)
    except ImageNotFound:
        if not docker.registry(settings.image):
            raise StageError(
                f"expected the image {settings.image}, the engine has none; make it: make image "
                f"IMAGE={settings.image}, or name another: --image"
            ) from None
        image = _pulled(client, settings.image)
    label, lock = image.labels.get(LOCK_LABEL), hashlib.sha256(_LOCK.read_bytes()).hexdigest()
    if label is None:
        warn(f"{settings.image} does not say of which requirements.lock it is; make one that does: make image")
    elif label != lock:
        raise StageError(
            f"expected {settings.image} to be of this requirements.lock, {lock[:12]}, got one of {safe(label)[:12]}; "
            f"make it anew: make image IMAGE={settings.image}"
        )


def _pulled(client: DockerClient, image: str) -> Image:
    tagged = "@" in image or ":" in image.rpartition("/")[2]
    try:
        return client.images.pull(image if tagged else f"{image}:latest")
    except DockerException as error:
        raise StageError(
            f"expected the image {image}, the engine can not fetch it ({_line(error)}); log in to the registry, or "
            "name another: --image"
        ) from error


def _find(client: DockerClient, settings: Settings, url: str, auth: str | None) -> dict[str, Any]:
    """What a container of the pool finds: the worker's arguments, but for the command."""
    template = docker.template(settings)["job_configuration"]
    configuration = DockerWorkerJobConfiguration(**template)
    run = FlowRun(id=uuid4(), flow_id=uuid4(), name="deepclust-probe")
    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: auth}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # podman's version is taken for Docker's
        configuration.prepare_for_flow_run(run)
        arguments = Worker(work_pool_name="probe")._build_container_settings(client, configuration)
    arguments |= {"name": None, "command": ["python", "-c", f"{inspect.getsource(_look_around)}\n_look_around()"]}
    container: Container | None = None
    try:
        container = client.containers.create(**arguments)
        container.start()
        status = container.wait(timeout=_SECONDS)["StatusCode"]
        output, errors = (container.logs(**{other: False}).decode("utf-8", "replace") for other in ("stderr", "stdout"))
    except (DockerException, OSError) as error:  # OSError: no answer in time
        if "capabilities" in str(error) or "nvidia" in str(error).lower():
            raise StageError(_no_gpu(settings, _line(error))) from error
        raise StageError(
            f"expected a container of {settings.image} to start, got {_line(error)}; mend what it names, or the options"
        ) from error
    finally:
        if container is not None:
            with contextlib.suppress(DockerException, OSError):
                container.remove(force=True)
    try:
        found = json.loads(output)
    except ValueError as error:
        raise StageError(
            f"expected a container of {settings.image} to run Python, it ended with status {status} "
            f"({safe(errors.strip())[-200:]}); use an image of this repository: make image"
        ) from error
    assert isinstance(found, dict)
    return found


def _check_server(settings: Settings, url: str, where: str, found: dict[str, Any]) -> None:
    if found["status"] == 401:
        raise StageError(server.refused(url))
    if found["status"] != 200:
        got = safe(found["server"]) or f"status {found['status']}"
        remedy = "is a firewall between them?"
        if settings.network != "host":
            remedy = "a server on this machine's loopback device is reached from --network host only"
        raise StageError(f"expected Prefect's server at {safe(url)} to answer {where}, got {got}; {remedy}")


def _no_gpu(settings: Settings, got: str) -> str:
    return (
        f"expected the GPUs of this machine in a container of {settings.image} (--gpus all), got {got}; install "
        "nvidia-container-toolkit and restart the engine, or leave the option out"
    )


def _line(error: Exception) -> str:
    explanation = getattr(error, "explanation", None)
    return safe(" ".join(str(explanation or error).split()))[:300]
