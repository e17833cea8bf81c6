"""Starts in the background what `prefect deployment run pretrain-and-eval/local` needs; safe to repeat.

python -m flows.serve          server (or the one that PREFECT_API_URL names), work pool, deployment, worker
python -m flows.serve --stop   ends what was started here
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

from flows import access
from flows.server import answers, get, refused
from tasks.shared.operations.lock import locked
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.processes.supervisor import lives
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout

POOL = "deepclust"
LOCAL = "http://127.0.0.1:4200/api"
FOLDER = layout.STATE / "serve"
_PREFECT = (sys.executable, "-m", "prefect", "--no-prompt")


def _background(name: str, command: Sequence[str], url: str, auth: str | None = None, **environment: str) -> str:
    """Start a command that outlives this process, unless it runs already for the same server; returns what was done.

    The process holds a lock on `<name>.pid` as long as it lives, so that the number of a dead one is never trusted. The
    file's other lines are the server's URL and a hash of its credential: a worker of another server would never see
    what this one schedules. The credential itself is passed in the environment: anyone can read a command line.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    FOLDER.chmod(0o700)  # the URL, and what Prefect logs, may hold a password
    of = [url, hashlib.sha256(auth.encode()).hexdigest() if auth else "none"]
    how = "started"
    if _pid(name) is not None:
        if _server_of(name) == of:
            return "was running"
        how = "restarted: it was another server's, or had another credential"
        _end(name)
    if auth:
        environment["PREFECT_API_AUTH_STRING"] = auth
    with (FOLDER / f"{name}.pid").open("a+", encoding="utf-8") as file, (FOLDER / f"{name}.log").open("ab") as log:
        if not _lock(file.fileno()):
            return "was running"
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, "PREFECT_API_URL": url},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[file.fileno()],
        )
        os.fchmod(file.fileno(), 0o600)
        file.truncate(0)
        file.write("\n".join([str(process.pid), *of, ""]))
    return how


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _pid(name: str) -> int | None:
    """The process that was started in the background, if it lives."""
    path = FOLDER / f"{name}.pid"
    if not path.exists():
        return None
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        return None if _lock(file.fileno()) else int(file.readline() or 0) or None


def _server_of(name: str) -> list[str]:
    """URL and hash of the credential of the server that the process in the background was started for."""
    path = FOLDER / f"{name}.pid"
    return path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []


def _is_ours(url: str) -> bool:
    """Whether the server at this address was started here."""
    return _pid("server") is not None and _server_of("server")[:1] == [url]


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
        how = _background("server", command, url, auth, **access.server_environment(url))
        _wait(lambda: answers(url), "server")
    return url, auth, how


def _wait(ready: Callable[[], bool], name: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if _pid(name) is None or time.monotonic() > deadline:
            raise StageError(f"expected the {name} to come up; it did not; see {FOLDER / name}.log")
        time.sleep(0.3)


def _template() -> dict[str, Any]:
    """What a run may decide of its process: not its command or environment, and an unknown variable is refused."""
    from prefect.workers.process import ProcessWorker

    template: dict[str, Any] = ProcessWorker.get_default_base_job_template()
    for name in ("command", "env"):
        del template["job_configuration"][name]
        del template["variables"]["properties"][name]
    template["variables"]["additionalProperties"] = False
    return template


def _pool(url: str, auth: str | None) -> dict[str, Any] | None:
    """The work pool as the server knows it, None if there is none."""
    try:
        with get(f"{url}/work_pools/{POOL}", seconds=10, auth=auth) as reply:
            pool = json.loads(reply.read())
            return pool if isinstance(pool, dict) else {}
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        if error.code == 401:
            raise StageError(refused(url)) from error
        raise StageError(
            f"expected Prefect's API at {url}, got status {error.code}; mend PREFECT_API_URL or the server there"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise StageError(
            f"expected Prefect's API at {url}, got {why}; is the server there healthy? run again"
        ) from error


def _make_pool(url: str, auth: str | None) -> None:
    """Make the work pool, or give one of an earlier version today's template."""
    template = _template()
    pool = _pool(url, auth)
    if pool is not None and pool.get("type") != "process":
        raise StageError(
            f"expected the work pool {POOL} at {url} to be of type 'process', got {pool.get('type')!r}; delete it"
        )
    if pool is not None and pool.get("base_job_template") == template:
        return
    what = ["update", POOL] if pool is not None else ["create", POOL, "--type", "process"]
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(template, file)
        file.flush()
        _prefect(url, auth, "work-pool", *what, "--base-job-template", file.name)


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
    _make_pool(url, auth)
    worker = [*_PREFECT, "worker", "start", "--pool", POOL, "--type", "process"]
    how_worker = _background("worker", worker, url, auth)
    _prefect(url, auth, "deploy", "--all")
    if _pid("worker") is None:
        raise StageError(f"expected the worker to run, but it ended; see {FOLDER / 'worker.log'}")
    say(f"server      {url.removesuffix('/api')} ({how})")
    say(f"pool        {POOL}")
    say("deployment  pretrain-and-eval/local")
    say(f"worker      {how_worker}, log in {FOLDER / 'worker.log'}")
    say("", f"export PREFECT_API_URL={url}")
    if _is_ours(url):
        say(f'export PREFECT_API_AUTH_STRING="$(cat {access.FILE})"')
    say(f"{os.path.relpath(Path(sys.executable).with_name('prefect'))} deployment run pretrain-and-eval/local --watch")
    say("make stop   ends what was started here")


def stop() -> None:
    """End the worker and the server that were started here, with what they run."""
    for name in ("worker", "server"):
        say(f"{name:<8}{'stopped' if _end(name) else 'was not running'}")


def _end(name: str) -> bool:
    """End a process in the background, with what it runs. False if it did not run."""
    pid = _pid(name)
    if pid is None:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        # A worker waits for its runs, not always with success, and leaves them behind when it is killed.
        _stop(process.children(), patience=25)  # a stage has 15 seconds to save its state
        _stop([process], patience=10)
    return True


def _stop(processes: Sequence[psutil.Process], *, patience: float) -> None:
    """SIGTERM to all, SIGKILL to who is left after so many seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        deadline = time.monotonic() + patience
        while any(map(lives, processes)) and time.monotonic() < deadline:
            time.sleep(0.2)


def main() -> None:
    """Serve, or stop serving."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description="Server, pool, deployment and worker.")
    parser.add_argument("--stop", action="store_true", help="end the server and the worker that were started here")
    arguments = parser.parse_args()
    with errors_as_one_line():
        stop() if arguments.stop else serve()


if __name__ == "__main__":
    main()
