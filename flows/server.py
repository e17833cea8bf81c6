"""Prefect's server for one flow run, where none is configured: on the loopback device, gone when the flow is."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.shared.operations.processes import child_processes
from tasks.shared.operations.processes.dvc_runner import StageError

HOME = Path(".prefect")  # the runs of this workspace; `make serve` shows them too
_PATIENCE = 120.0  # seconds; 11 to 21 are usual on two cores


@contextlib.contextmanager
def configured() -> Iterator[str]:
    """Use the server that is configured, else start one that ends with this process; yields its address.

    Prefect would start a temporary server itself, but a flow ended by SIGKILL would leave that one running.

    Raises:
        StageError: If the server does not come up.
    """
    url = PREFECT_API_URL.value() or _start()
    with temporary_settings({PREFECT_API_URL: url}):
        yield url


def _start() -> str:
    family = child_processes.ChildProcesses(grace=3)
    atexit.register(family.stop)  # not sooner: Prefect sends its last logs while the interpreter exits
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    HOME.mkdir(exist_ok=True)
    # To a file, because a server that is being stopped prints errors about its own cancelled tasks.
    log = HOME / "server.log"
    with log.open("wb") as errors:
        server = family.start(
            [
                *(sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)),
                *("--no-scheduler", "--no-late-runs", "--analytics-off", "--log-level", "ERROR"),
            ],
            env={"PREFECT_HOME": str(HOME.resolve())},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    begin = time.monotonic()
    while not answers(url):
        if server.poll() is not None:
            raise StageError(f"Prefect's server ended with status {server.returncode}; see {log}")
        if time.monotonic() - begin > _PATIENCE:
            raise StageError(f"Prefect's server did not answer within {_PATIENCE:g} s; is the machine overloaded?")
        time.sleep(0.2)
    return url


def answers(url: str) -> bool:
    """Whether a Prefect server answers at this address (`…/api`)."""
    with (
        contextlib.suppress(OSError, http.client.HTTPException, ValueError),
        get(f"{url}/health", seconds=2) as reply,
    ):
        return reply.status == 200 and reply.read().strip() == b"true"
    return False


def get(url: str, *, seconds: float) -> http.client.HTTPResponse:
    """Open an address of the server, without the environment's proxy, which may not reach this machine.

    Raises:
        OSError: If nobody answers in time, or with an error (`urllib.error.HTTPError`).
        http.client.HTTPException: If what answers does not speak HTTP.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return cast(http.client.HTTPResponse, opener.open(url, timeout=seconds))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
