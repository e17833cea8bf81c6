"""Prefect's server for one flow run, where none is configured: on the loopback device, gone when the flow is."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from flows.servers import access, database, watchdog
from tasks.shared.operations.lock import locked
from tasks.shared.operations.processes import child_processes
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.text import masked

_PATIENCE = 120.0  # seconds; 11 to 21 are usual on two cores
_until_exit = contextlib.ExitStack()


@contextlib.contextmanager
def configured(*, hold: Sequence[int] = ()) -> Iterator[str]:
    """Use the server that is configured, else start one that ends with this process; yields its address.

    Prefect would start a temporary server itself, but a flow ended by SIGKILL would leave that one running. If the
    server is lost, the process ends: see watchdog.py.

    Args:
        hold: Descriptors that the started server's supervisor keeps open, such as a locked file's.

    Raises:
        StageError: If the server does not come up, or refuses this client.
    """
    if url := PREFECT_API_URL.value():
        settings = {PREFECT_API_URL: url}
        admitted(url)
    else:
        settings = {PREFECT_API_AUTH_STRING: access.credential()}
        settings[PREFECT_API_URL] = url = _start(hold)
    with contextlib.ExitStack() as stack:
        stack.enter_context(temporary_settings(settings))
        if answers(url):  # else it is only reached in ways that Prefect knows, such as a proxy
            stack.enter_context(watchdog.watched(masked(url), partial(answers, url)))
        yield url


def watch_for_worker() -> None:
    """In a process in which a worker runs a flow: end it too if the server is lost, until the process ends."""
    url = PREFECT_API_URL.value()
    if url and "PREFECT__FLOW_RUN_ID" in os.environ and answers(url):
        _until_exit.enter_context(watchdog.watched(masked(url), partial(answers, url)))


def admitted(url: str) -> None:
    """Refuse a server that can not be used, in seconds, where Prefect would try for minutes."""
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1, PREFECT_API_REQUEST_TIMEOUT: 20}),
            get_client(sync_client=True) as client,
        ):
            client.hello()
    except (httpx.HTTPError, RuntimeError) as error:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 401:
            raise StageError(refused(url)) from error
        why = masked(str(error).partition("\n")[0]) or type(error).__name__
        raise StageError(
            f"expected a Prefect server at {masked(url)} (PREFECT_API_URL), got {why}; start it, or unset the variable"
        ) from error


def refused(url: str) -> str:
    """What to do about a server that answers with status 401."""
    return (
        f"expected PREFECT_API_AUTH_STRING to be what the server at {masked(url)} asks for, but it refuses the request "
        f'(status 401); if `make serve` started it: export PREFECT_API_AUTH_STRING="$(cat {access.FILE})"'
    )


def _start(hold: Sequence[int]) -> str:
    family = child_processes.ChildProcesses(grace=3, hold=hold)
    atexit.register(family.stop)  # not sooner: Prefect sends its last logs while the interpreter exits
    access.HOME.mkdir(mode=0o700, exist_ok=True)
    # To a file, because a server that is being stopped prints errors about its own cancelled tasks.
    log = access.HOME / "server.log"
    with locked("server"), log.open("wb") as errors:  # two servers can not migrate one database at once
        database.check()
        port = _free_port()
        url = f"http://127.0.0.1:{port}/api"
        server = family.start(
            [
                *(sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)),
                *("--no-scheduler", "--no-late-runs", "--analytics-off", "--log-level", "ERROR"),
            ],
            env=access.server_environment(url),
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
    """Whether a Prefect server answers at this address (`…/api`). It need not admit who asks."""
    with (
        contextlib.suppress(OSError, http.client.HTTPException, ValueError),
        request(f"{url}/health", seconds=5) as reply,
    ):
        return reply.status == 200 and reply.read().strip() == b"true"
    return False


def request(
    url: str, *, seconds: float, auth: str | None = None, method: str = "GET", body: object = None
) -> http.client.HTTPResponse:
    """Ask the server, without the environment's proxy, which may not reach this machine.

    Args:
        url: The address to open.
        seconds: How long to wait for an answer.
        auth: The string that the server asks for.
        method: GET, POST or PATCH.
        body: What to send, as JSON.

    Raises:
        OSError: If nobody answers in time, or with an error (`urllib.error.HTTPError`).
        http.client.HTTPException: If what answers does not speak HTTP.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    if auth:
        asked.add_unredirected_header("Authorization", access.authorization(auth))
    return cast(http.client.HTTPResponse, opener.open(asked, timeout=seconds))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
