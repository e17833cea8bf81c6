"""A container engine for these tests: the one that answers, else podman, which is installed and started here.

The engine of ours works as root on Debian, in a sandbox too: its containers use the host's network and no cgroups, so
limits do nothing. It keeps its images in ~/.cache/deepclust/containers (`rm -r` frees the space), and ends with the
process that started it. Variables:

    DOCKER_HOST   the engine to use
    BASE_IMAGE    what the image is built from, python:3.11-slim-bookworm by default. Where that can not be pulled, an
                  image of Debian's packages takes its place
    BUILD_ARGS    further options of `podman build` or `docker build`
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import docker
from docker.errors import APIError, DockerException, ImageNotFound
from requests.exceptions import RequestException

from tests.paths import ROOT
from tests.services import folders

IMAGE = "deepclust:services"
LOCK_LABEL = "deepclust.lock"  # of an image: sha256 of the requirements.lock that is installed in it
_BASE = "python:3.11-slim-bookworm"
_DEBIAN = "localhost/deepclust-debian"  # stands in for it; without a tag, for podman 4.3 imports every image as latest
_STORE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepclust" / "containers"
_PACKAGES = ("podman", "crun", "debootstrap")
_HOW = "start Docker or podman, and name its socket if it is not the usual one: DOCKER_HOST=unix:///path/to/socket"


class EngineError(Exception):
    """There is no engine, or it can not do what is needed. One line: what is missing, and how to get it."""


@dataclass(frozen=True)
class Engine:
    """An engine that answers.

    Attributes:
        client: Of its Docker API.
        environment: By which other programs find it.
    """

    client: docker.DockerClient
    environment: Mapping[str, str]

    @property
    def is_podman(self) -> bool:
        """Whether it is podman behind Docker's API."""
        return "Podman" in self.client.version()["Components"][0]["Name"]


@contextmanager
def running() -> Iterator[Engine]:
    """Yield an engine; one that was started here is stopped at the end.

    Raises:
        EngineError: If none answers and none can be started.
    """
    host = os.environ.get("DOCKER_HOST", "")
    if found := _answering(host or "unix:///var/run/docker.sock"):
        yield found
    elif host:
        raise EngineError(f"expected a container engine at {host} (DOCKER_HOST), none answers; {_HOW}")
    elif os.getuid() or not Path("/etc/debian_version").exists():
        raise EngineError(f"expected a container engine, found none, and only root on Debian can install one; {_HOW}")
    else:
        _install()
        with _started() as engine:
            yield engine


def _answering(host: str) -> Engine | None:
    try:
        client = docker.DockerClient(base_url=host, timeout=120)
        client.ping()
    except (DockerException, RequestException):
        return None
    return Engine(client, {"DOCKER_HOST": host})


def _install() -> None:
    missing = [name for name in _PACKAGES if not shutil.which(name)]
    if not missing:
        return
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}}
    try:
        subprocess.run(["apt-get", "update", "-q"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing], **quiet)
    except subprocess.CalledProcessError as error:
        raise EngineError(f"expected to install {' '.join(missing)}, but apt-get failed; {_HOW}") from error


@contextmanager
def _started() -> Iterator[Engine]:
    """Podman, serving Docker's API on a socket of its own, with settings of its own."""
    _STORE.mkdir(parents=True, exist_ok=True)
    with folders.folder("deepclust-engine-") as folder:
        # Podman's own limits are higher than a sandbox allows, and it lowers that of its processes to the kernel's.
        most = int(Path("/proc/sys/kernel/pid_max").read_text())
        limits = {"nofile": _limit(resource.RLIMIT_NOFILE), "nproc": min(_limit(resource.RLIMIT_NPROC), most)}
        (folder / "containers.conf").write_text(
            f'[containers]\ncgroups = "disabled"\nnetns = "host"\ndefault_ulimits = '
            f"{json.dumps([f'{limit}={number}:{number}' for limit, number in limits.items()])}\n"
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n',
            encoding="utf-8",
        )
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{_STORE}/storage"\nrunroot = "{_STORE}/run"\n',
            encoding="utf-8",
        )
        settings = {
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }
        host = f"unix://{folder}/engine.sock"
        # crun refuses cgroups of both versions side by side, so the engine alone does not see the second. It dies with
        # this process, however that ends.
        serve = f"umount /sys/fs/cgroup/unified 2>/dev/null; exec podman system service --time=0 {host}"
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c", serve]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
        try:
            yield Engine(_when_it_answers(host, process, folder / "log").client, {"DOCKER_HOST": host} | settings)
        finally:
            process.terminate()
            process.wait(20)
            subprocess.run(
                ["umount", "--quiet", str(_STORE / "storage/overlay")], check=False, stderr=subprocess.DEVNULL
            )


def _limit(number: int) -> int:
    """This process's hard limit of a resource; a high number where it has none."""
    hard = resource.getrlimit(number)[1]
    return hard if hard != resource.RLIM_INFINITY else 1_048_576


def _when_it_answers(host: str, process: subprocess.Popen[bytes], log: Path) -> Engine:
    for _ in range(150):
        if engine := _answering(host):
            return engine
        if process.poll() is not None:
            break
        time.sleep(0.2)
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise EngineError(f"expected podman to serve Docker's API, it did not: {said[-1] if said else 'no answer'}; {_HOW}")


def image(engine: Engine) -> str:
    """Build the repository's image, unless the one that is there has this requirements.lock; its name.

    Raises:
        EngineError: If it can not be built.
    """
    lock = hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    before = _find(engine, IMAGE)
    if before and before.labels.get(LOCK_LABEL) == lock:
        return IMAGE
    options = ["--build-arg", f"BASE_IMAGE={_base(engine)}", "--build-arg", f"LOCK={lock}", "--tag", IMAGE]
    if engine.is_podman:
        # Without cgroups, and without a second copy of the libraries in layers that only another build would use.
        options += ["--isolation", "chroot", "--layers=false"]
        if "SSL_CERT_FILE" in os.environ:  # certificates of this machine, without which pip may get nothing
            options += ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    program = "podman" if engine.is_podman else "docker"
    command = [program, "build", *options, *shlex.split(os.environ.get("BUILD_ARGS", "")), str(ROOT)]
    if not shutil.which(program):
        raise EngineError(f"expected the command {program}, which builds the image, found none; install it")
    if subprocess.run(command, env=os.environ | dict(engine.environment), check=False).returncode:
        raise EngineError(f"expected the image to be built, but this failed: {shlex.join(command)}")
    if not _find(engine, IMAGE):
        raise EngineError(f"expected {program} to build for {engine.environment['DOCKER_HOST']}, it built for another")
    if before and not engine.client.images.get(before.id).tags:
        with contextlib.suppress(APIError):  # a container may use it
            engine.client.images.remove(before.id)
    return IMAGE


def _find(engine: Engine, name: str) -> docker.models.images.Image | None:
    try:
        return engine.client.images.get(name)
    except ImageNotFound:
        return None


def _base(engine: Engine) -> str:
    """What to build from: named, there, pulled, or made of Debian's packages."""
    if named := os.environ.get("BASE_IMAGE"):
        return named
    for name in (_BASE, _DEBIAN):
        if _find(engine, name):
            return name
    try:
        engine.client.images.pull(_BASE)
        return _BASE
    except APIError as error:
        if os.getuid() or not shutil.which("debootstrap"):
            raise EngineError(
                f"expected to pull {_BASE}, but it failed; name an image with Python and git: BASE_IMAGE=…"
            ) from error
    _make_base(engine)
    return _DEBIAN


def _make_base(engine: Engine) -> None:
    packages = "python3,python3-venv,ca-certificates,git"
    with folders.folder("deepclust-debian-") as folder:
        root = folder / "root"
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise EngineError(f"expected debootstrap to make a base image, it failed: {done.stdout.splitlines()[-1]}")
        (root / "usr/bin/python").symlink_to("python3")
        archive = folder / "root.tar"
        subprocess.run(["tar", "--directory", str(root), "--create", "--file", str(archive), "."], check=True)
        # pip and uv have certificates of their own, which are not those of every network.
        changes = ['CMD ["python3"]', "ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"]
        engine.client.api.import_image_from_file(str(archive), _DEBIAN, changes=changes)
