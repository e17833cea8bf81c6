"""Starts in the background what `prefect deployment run pretrain-and-eval/local` needs; safe to repeat.

python -m flows.serve                 server (or the one that PREFECT_API_URL names), work pool, deployments, worker
python -m flows.serve --docker        also the pool whose runs are containers of this machine's engine
python -m flows.serve --kubernetes    the pools whose runs are Jobs of the cluster that the command runs in
python -m flows.serve --machine       only a worker in the foreground, for this machine's share of a stage
python -m flows.serve --stop          ends what was started here
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import automations, machines, pools
from flows.pools import Pool, docker, kubernetes, process, registry
from flows.servers import access, background, database, server
from tasks.shared.operations.lock import locked
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.text import masked, say

LOCAL = "http://127.0.0.1:4200/api"
_PREFECT = (sys.executable, "-m", "prefect", "--no-prompt")


def _is_ours(url: str) -> bool:
    """Whether the server at this address was started here."""
    return background.pid("server") is not None and background.server_of("server")[:1] == [url]


def _server() -> tuple[str, str | None, str]:
    """Make sure that a server answers; its URL, the string that it asks for, and what was done.

    A server that was not started here is used only if PREFECT_API_URL names it, and with its own string: whoever runs
    it decides what the worker does.
    """
    named = PREFECT_API_URL.value()
    url = (named or LOCAL).rstrip("/")
    ours = _is_ours(url)
    if named and not ours and server.answers(url):
        return url, PREFECT_API_AUTH_STRING.value(), "was running"
    address = urlsplit(url)
    if address.hostname not in ("127.0.0.1", "localhost"):
        raise StageError(f"expected a Prefect server at {url}, none answers; start it, or unset PREFECT_API_URL")
    port = address.port or 4200
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    if taken and not ours:
        use = f"use it: PREFECT_API_URL={url} make serve; or " if server.answers(url) else ""
        raise StageError(
            f"expected port {port} to be free, but something that was not started here answers there; {use}choose "
            f"another: PREFECT_API_URL=http://127.0.0.1:{port + 1}/api make serve"
        )
    command = [*_PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port), "--analytics-off"]
    auth = access.credential()
    with locked("server"):  # two servers can not migrate one database at once
        if not ours:
            database.check()
        how = background.start("server", command, url, auth, **access.server_environment(url))
        background.wait(lambda: server.answers(url), "server")
    return url, auth, how


def _prefect(url: str, auth: str | None, *arguments: str) -> None:
    """Run a command of Prefect's, silent unless it fails."""
    credential = {"PREFECT_API_AUTH_STRING": auth} if auth else {}
    done = subprocess.run(
        [*_PREFECT, *arguments],
        # PWD is the folder in which the deployment's runs will work (prefect.yaml); the shell's may be another one.
        env={**os.environ, **credential, "PREFECT_API_URL": url, "PWD": str(Path.cwd())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise StageError(f"`prefect {' '.join(arguments)}` failed: {' '.join(done.stdout.split())}")


def _pools(arguments: argparse.Namespace) -> list[Pool]:
    """The work pools that the command line asks for."""
    if arguments.kubernetes:  # its server and workers are Deployments of the cluster
        return kubernetes.of(kubernetes.Settings.of(arguments))
    wanted = [process.pool()]
    if arguments.docker:
        wanted.append(docker.pool(docker.Settings.of(arguments), slots=arguments.gpu_slots))
    return wanted


def _tried(settings: docker.Settings, url: str, auth: str | None) -> str:
    """What a container of the pool finds."""
    try:
        from flows.pools import probe  # an image, in which a cluster's pools are made, has no Docker worker
    except ModuleNotFoundError as error:
        raise StageError(
            f"expected the package {error.name}, which --docker needs, found none; install it: make setup"
        ) from error
    return probe.check(settings, url, auth)


def serve(arguments: argparse.Namespace) -> None:
    """Start everything and print how to use it.

    Raises:
        StageError: If a part does not come up, or the options of a pool can not work.
    """
    wanted = _pools(arguments)
    url, auth, how = _server()
    found = _tried(docker.Settings.of(arguments), url, auth) if arguments.docker else ""
    for pool in wanted:
        registry.make(url, auth, pool)
    with (
        temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: auth}),
        get_client(sync_client=True) as client,
    ):
        automations.crash_on_lost_heartbeat(client)
        automations.end_cancelled(client)
    deployments = [name for pool in wanted for name in pool.deployments]
    _prefect(url, auth, "deploy", *(word for name in deployments for word in ("--name", name)))
    workers = {
        pool.worker: background.start(pool.worker, pool.command, url, auth, **pools.WORKER)
        for pool in wanted
        if pool.command
    }
    say(f"server        {url.removesuffix('/api')} ({how})")
    for pool in wanted:
        say(f"pool          {pool.name}")
    for name in deployments:
        say(f"deployment    {name}")
    if found:
        say(f"containers    {found}")
    for name, done in workers.items():
        if background.pid(name) is None:
            raise StageError(f"expected the {name} to run, but it ended; see {background.log(name)}")
        say(f"{name:<14}{done}, log in {background.log(name)}")
    say("", f"export PREFECT_API_URL={url}")
    if _is_ours(url):
        say(f'export PREFECT_API_AUTH_STRING="$(cat {access.FILE})"')
    say(f"{os.path.relpath(Path(sys.executable).with_name('prefect'))} deployment run pretrain-and-eval/local --watch")
    say("make stop     ends what was started here")


def machine() -> None:
    """Become this machine's worker for its share of stages that run on several machines; it ends with Ctrl-C.

    Raises:
        StageError: If the server that PREFECT_API_URL names does not answer, refuses the request or has no such pool.
    """
    url = PREFECT_API_URL.value()
    if not url:
        raise StageError("expected PREFECT_API_URL to name the server that asks for shares of stages; set it")
    server.admitted(url)
    auth = PREFECT_API_AUTH_STRING.value()
    if registry.read(url, auth, pools.PROCESS) is None:
        raise StageError(f"expected the work pool {pools.PROCESS} at {masked(url)}, found none; make it: make serve")
    command = process.command(
        pools.MACHINES, "--limit", "1", "--name", f"machine {platform.node()} {machines.address()}"
    )
    os.execve(command[0], command, {**os.environ, **pools.WORKER})


def stop() -> None:
    """End the workers and the server that were started here, with what they run."""
    _end("worker")  # first: the flows that wait for containers would start them again
    if background.pid(docker.WORKER) is not None:
        docker.end_containers(Path.cwd())  # for which the worker would wait
        _end(docker.WORKER)
        docker.end_containers(Path.cwd())  # which it has started since
    _end("server")


def _end(name: str) -> None:
    say(f"{name:<14}{'stopped' if background.end(name) else 'was not running'}")


def main() -> None:
    """Serve, or stop serving."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description="Server, pools, deployments, workers.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stop", action="store_true", help="end what was started here")
    what.add_argument("--machine", action="store_true", help="be this machine's worker for shares of stages")
    what.add_argument("--kubernetes", action="store_true", help="make the pools of the cluster in which this runs")
    parser.add_argument("--docker", action="store_true", help="also run stages in containers of this machine")
    parser.add_argument("--image", default=docker.Settings.image, help="of all containers (%(default)s)")
    parser.add_argument(
        "--gpu-slots", type=int, default=1, metavar="N", help="stages that compute at once (%(default)s)"
    )
    docker.options(parser)
    kubernetes.options(parser)
    arguments = parser.parse_args()
    with errors_as_one_line():
        if arguments.stop:
            stop()
        elif arguments.machine:
            machine()
        else:
            serve(arguments)


if __name__ == "__main__":
    main()
