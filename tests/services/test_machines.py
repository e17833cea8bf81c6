"""Two machines, which are network namespaces of this one: stages run as one torchrun job over both.

Skipped where namespaces can not be made: they need root and ip(8).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from benchmarks import two_machines
from benchmarks.two_machines import MACHINES, namespace
from flows.servers import access
from tests.pipelines import eventually
from tests.services import folders, workspaces
from tests.services.serving import Served

ADDRESS = MACHINES["first"]  # of the server, and of machine 0 as torchrun sorts them
SHARDED = ("prepare", "pretrain@swav", "embed@swav", "cluster@swav")
ALONE = {"DEEPCLUST_THREADS": "1", "DEEPCLUST_PARALLEL": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module", autouse=True)
def cable() -> Iterator[None]:
    if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", "deepclust-try"], check=False).returncode:
        pytest.skip("network namespaces can not be made here: they need root and ip(8)")
    subprocess.run(["ip", "netns", "delete", "deepclust-try"], check=True)
    with two_machines.cable():
        yield


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with folders.folder("deepclust-machines-") as path:
        (path / "home").mkdir()
        workspaces.give(path / "home")
        yield path


def _on(machine: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", namespace(machine), *workspaces.as_user(command)]


@contextmanager
def _running(root: Path, machine: str, name: str, *command: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the background of a machine, with a log beside the workspace; ended at the end."""
    environment = workspaces.environment(root, **variables) | {"PWD": str(root)}
    with (root.parent / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(_on(machine, *command), cwd=root, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        if process.poll() is None:
            two_machines.kill(process)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    """A workspace that both machines see, with a server on the first, and a worker on each."""
    root = workspaces.make(folder / "workspace", "encoders=[swav]")
    url = f"http://{ADDRESS}:4200/api"
    with contextlib.chdir(root):
        auth = access.credential()
        server = access.server_environment(url)
    workspaces.give(root)
    names = ALONE | {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": auth}
    environment = workspaces.environment(root, **names)
    found = Served(root, url, auth, environment, "")
    python = [sys.executable, "-m"]
    host = ["prefect", "server", "start", "--host", ADDRESS, "--port", "4200", "--analytics-off"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_running(root, "first", "server", *python, *host, **names, **server))
        health = _on("first", "curl", "--silent", "--noproxy", "*", f"{url}/health")
        assert eventually(lambda: subprocess.run(health, capture_output=True).stdout.strip() == b"true", 300)
        _run(found, "python", "-m", "flows.serve")
        stack.callback(_run, found, "python", "-m", "flows.serve", "--stop")
        for machine in MACHINES:
            stack.enter_context(_running(root, machine, machine, *python, "flows.serve", "--machine", **names))
        yield found


def _run(served: Served, *command: str) -> str:
    done = subprocess.run(
        _on("first", *command),
        cwd=served.root,
        env=served.environment | {"PWD": str(served.root)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _locked(root: Path) -> dict[str, object]:
    stages: dict[str, object] = YAML(typ="safe").load(root / "dvc.lock")["stages"]
    return stages


def _metrics(root: Path) -> dict[str, float]:
    """The numbers of the sharded stages by their places."""
    stages = ("pretrain", "embed", "cluster")
    files = {stage: json.loads((root / f"metrics/{stage}/swav.json").read_text("utf-8")) for stage in stages}
    return dict(_numbers(files, ""))


def _numbers(value: object, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, (int, float)):
        yield place, value
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(item, f"{place}/{key}")


def test_two_machines_run_the_stages_as_one_and_leave_what_one_leaves(served: Served, folder: Path) -> None:
    alone = workspaces.make(folder / "alone", "encoders=[swav]")
    workspaces.run(alone, "python", "-m", "dvc", "repro", "cluster@swav", DEEPCLUST_TRACKING="off", **ALONE)
    stages = ("prepare", "pretrain", "embed", "cluster")
    printed = _run(served, "python", "-m", "flows.pipeline", "--stages", *stages, "--machines", "2")
    assert "Traceback" not in printed
    assert _locked(served.root)["prepare"] == _locked(alone)["prepare"]
    assert _metrics(served.root) == pytest.approx(_metrics(alone), rel=0.01, abs=0.01)
    shares = {run["name"]: run for run in _shares(served)}
    assert set(shares) == {f"{stage} on machine {machine}" for stage in SHARDED for machine in range(2)}
    assert {run["state"]["type"] for run in shares.values()} == {"COMPLETED"}
    for stage in SHARDED:
        meet = next(line for line in _logs(served, shares[f"{stage} on machine 0"]["id"]) if "machines meet at" in line)
        assert all(f"({address})" in meet for address in MACHINES.values()), meet
    assert not list((served.root / "state/meetings").iterdir())


def _ask(served: Served, path: str, body: object) -> list[dict[str, object]]:
    """What the API answers, which only the two machines reach."""
    command = [
        *("curl", "--silent", "--noproxy", "*", "--user", served.auth, "--json", json.dumps(body)),
        f"{served.url}/{path}",
    ]
    answer: list[dict[str, object]] = json.loads(
        subprocess.run(_on("first", *command), check=True, capture_output=True).stdout
    )
    return answer


def _shares(served: Served) -> list[dict[str, object]]:
    found = _ask(served, "flow_runs/filter", {"flows": {"name": {"any_": ["stage"]}}, "sort": "START_TIME_ASC"})
    return [run for run in found if "on machine" in str(run["name"])]


def _logs(served: Served, number: object) -> list[str]:
    wanted = {"logs": {"flow_run_id": {"any_": [number]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
    return [str(line["message"]) for line in _ask(served, "logs/filter", wanted)]
