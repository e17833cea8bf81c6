"""Starts in the background what `prefect deployment run pretrain-and-eval/local` needs; safe to repeat.

python -m flows.serve          server (or the one that PREFECT_API_URL names), work pool, deployment, worker
python -m flows.serve --stop   ends what was started here
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

from flows import access, background, pools
from flows.pools import process, registry
from flows.server import answers
from tasks.shared.operations.lock import locked
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.text import say

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
    if named and not ours and answers(url):
        return url, PREFECT_API_AUTH_STRING.value(), "was running"
    address = urlsplit(url)
    if address.hostname not in ("127.0.0.1", "localhost"):
        raise StageError(f"expected a Prefect server at {url}, none answers; start it, or unset PREFECT_API_URL")
    port = address.port or 4200
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    if taken and not ours:
        use = f"use it: PREFECT_API_URL={url} make serve; or " if answers(url) else ""
        raise StageError(
            f"expected port {port} to be free, but something that was not started here answers there; {use}choose "
            f"another: PREFECT_API_URL=http://127.0.0.1:{port + 1}/api make serve"
        )
    command = [*_PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port), "--analytics-off"]
    auth = access.credential()
    with locked("server"):  # two servers can not migrate one database at once
        how = background.start("server", command, url, auth, **access.server_environment(url))
        background.wait(lambda: answers(url), "server")
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


def serve() -> None:
    """Start everything and print how to use it.

    Raises:
        StageError: If a part does not come up.
    """
    url, auth, how = _server()
    registry.make(url, auth, pools.PROCESS, process.TYPE, process.template())
    worker = [*_PREFECT, "worker", "start", "--pool", pools.PROCESS, "--type", process.TYPE]
    how_worker = background.start("worker", worker, url, auth)
    _prefect(url, auth, "deploy", "--all")
    if background.pid("worker") is None:
        raise StageError(f"expected the worker to run, but it ended; see {background.log('worker')}")
    say(f"server      {url.removesuffix('/api')} ({how})")
    say(f"pool        {pools.PROCESS}")
    say("deployment  pretrain-and-eval/local")
    say(f"worker      {how_worker}, log in {background.log('worker')}")
    say("", f"export PREFECT_API_URL={url}")
    if _is_ours(url):
        say(f'export PREFECT_API_AUTH_STRING="$(cat {access.FILE})"')
    say(f"{os.path.relpath(Path(sys.executable).with_name('prefect'))} deployment run pretrain-and-eval/local --watch")
    say("make stop   ends what was started here")


def stop() -> None:
    """End the worker and the server that were started here, with what they run."""
    for name in ("worker", "server"):
        say(f"{name:<8}{'stopped' if background.end(name) else 'was not running'}")


def main() -> None:
    """Serve, or stop serving."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description="Server, pool, deployment and worker.")
    parser.add_argument("--stop", action="store_true", help="end the server and the worker that were started here")
    arguments = parser.parse_args()
    with errors_as_one_line():
        stop() if arguments.stop else serve()


if __name__ == "__main__":
    main()
