"""Starts in the background what `prefect deployment run pretrain-and-eval/local` needs; safe to repeat.

python -m flows.serve          server (one that already runs is used), work pool, deployment, worker
python -m flows.serve --stop   ends what was started here
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from prefect.settings import PREFECT_API_URL

from flows.server import HOME, answers, get
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.outputs import layout

POOL = "deepclust"
LOCAL = "http://127.0.0.1:4200/api"
FOLDER = layout.STATE / "serve"
_PREFECT = (sys.executable, "-m", "prefect", "--no-prompt")


def _background(name: str, command: Sequence[str], url: str, **environment: str) -> str:
    """Start a command that outlives this process, unless it runs already for the same server; returns what was done.

    The process holds a lock on `<name>.pid` as long as it lives, so that the number of a dead one is never trusted. The
    file's second line is the server's URL: a worker of another server would never see what this one schedules.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    how = "started"
    if _pid(name) is not None:
        if _url(name) == url:
            return "was running"
        how = "restarted: it was another server's"
        _end(name)
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
        file.truncate(0)
        file.write(f"{process.pid}\n{url}\n")
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


def _url(name: str) -> str:
    """URL of the server that the process in the background was started for."""
    path = FOLDER / f"{name}.pid"
    return "".join(path.read_text(encoding="utf-8").splitlines()[1:2]) if path.exists() else ""


def _server(url: str) -> str:
    """Make sure that a server answers at `url`; returns what was done."""
    if answers(url):
        return "was running"
    address = urlsplit(url)
    if address.hostname not in ("127.0.0.1", "localhost"):
        raise StageError(f"expected a Prefect server at {url}, none answers; start it, or unset PREFECT_API_URL")
    port = address.port or 4200
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    if taken and (_pid("server") is None or _url("server") != url):
        raise StageError(
            f"expected port {port} to be free or Prefect's, but something else answers there; choose another: "
            f"PREFECT_API_URL=http://127.0.0.1:{port + 1}/api make serve"
        )
    command = [*_PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port), "--analytics-off"]
    how = _background("server", command, url, PREFECT_HOME=str(HOME.resolve()))
    _wait(lambda: answers(url), "server")
    return how


def _wait(ready: Callable[[], bool], name: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if _pid(name) is None or time.monotonic() > deadline:
            raise StageError(f"expected the {name} to come up; it did not; see {FOLDER / name}.log")
        time.sleep(0.3)


def _has_pool(url: str) -> bool:
    try:
        with get(f"{url}/work_pools/{POOL}", seconds=10):
            return True
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise StageError(
            f"expected Prefect's API at {url}, got status {error.code}; mend PREFECT_API_URL or the server there"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or error
        raise StageError(
            f"expected Prefect's API at {url}, got {why}; is the server there healthy? run again"
        ) from error


def _prefect(url: str, *arguments: str) -> None:
    """Run a command of Prefect's, silent unless it fails."""
    done = subprocess.run(
        [*_PREFECT, *arguments],
        # PWD is the folder in which the deployment's runs will work (prefect.yaml); the shell's may be another one.
        env={**os.environ, "PREFECT_API_URL": url, "PWD": str(Path.cwd())},
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
    url = str(PREFECT_API_URL.value() or LOCAL).rstrip("/")
    how = _server(url)
    if not _has_pool(url):
        _prefect(url, "work-pool", "create", POOL, "--type", "process")
    worker = [*_PREFECT, "worker", "start", "--pool", POOL, "--type", "process"]
    how_worker = _background("worker", worker, url)
    _prefect(url, "deploy", "--all")
    if _pid("worker") is None:
        raise StageError(f"expected the worker to run, but it ended; see {FOLDER / 'worker.log'}")
    print(f"server      {url.removesuffix('/api')} ({how})")
    print(f"pool        {POOL}")
    print("deployment  pretrain-and-eval/local")
    print(f"worker      {how_worker}, log in {FOLDER / 'worker.log'}")
    print(f"\nexport PREFECT_API_URL={url}")
    print(
        f"{os.path.relpath(Path(sys.executable).with_name('prefect'))} deployment run pretrain-and-eval/local --watch"
    )
    print("make stop   ends what was started here")


def stop() -> None:
    """End the worker and the server that were started here, with what they run."""
    for name in ("worker", "server"):
        print(f"{name:<8}{'stopped' if _end(name) else 'was not running'}")


def _end(name: str) -> bool:
    """End a process in the background, with what it runs. False if it did not run."""
    pid = _pid(name)
    if pid is None:
        return False
    for number, patience in ((signal.SIGTERM, 40.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience
        while _pid(name) and time.monotonic() < deadline:
            time.sleep(0.2)
        if not _pid(name):
            break
    return True


def main() -> None:
    """Serve, or stop serving."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description="Server, pool, deployment and worker.")
    parser.add_argument("--stop", action="store_true", help="end the server and the worker that were started here")
    arguments = parser.parse_args()
    with errors_as_one_line():
        stop() if arguments.stop else serve()


if __name__ == "__main__":
    main()
