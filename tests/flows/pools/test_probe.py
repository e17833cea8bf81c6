"""What would keep the pool's containers from working is one line with the remedy, before there is a run."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from docker.errors import APIError, ImageNotFound

from flows.pools import docker, probe
from tasks.shared.operations.processes.dvc_runner import StageError

URL = "http://127.0.0.1:4200/api"
WELL = {"workspace": True, "unwritable": [], "gpus": 2, "server": "", "status": 200}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("requirements.lock").write_text("torch==2\n")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """An engine with the image, whose containers find that all is well."""
    client = Mock()
    client.version.return_value = {"Version": "27.0.0"}
    client.images.get.return_value.labels = {probe.LOCK_LABEL: hashlib.sha256(b"torch==2\n").hexdigest()}
    _prints(client, json.dumps(WELL))

    @contextmanager
    def engine() -> Iterator[Mock]:
        yield client

    monkeypatch.setattr(docker, "engine", engine)
    return client


def _prints(client: Mock, output: str, errors: str = "") -> None:
    container = client.containers.create.return_value
    container.wait.return_value = {"StatusCode": 0}
    container.logs.side_effect = lambda stdout=True, stderr=True: (output if stdout else errors).encode()


def _check(**settings: Any) -> str:
    return probe.check(docker.Settings(workspace=Path.cwd(), **settings), URL, "me:the-password")


def test_the_container_is_the_pools_and_is_removed(client: Mock) -> None:
    assert _check(user="7:7", gpus="all") == "user 7:7, 2 GPUs"
    asked = client.containers.create.call_args.kwargs
    assert (asked["user"], asked["working_dir"], asked["network_mode"]) == ("7:7", str(Path.cwd()), "host")
    assert asked["device_requests"]
    assert asked["environment"]["PREFECT_API_URL"] == URL
    assert asked["environment"]["PREFECT_API_AUTH_STRING"] == "me:the-password"
    assert "the-password" not in " ".join(asked["command"])
    client.containers.create.return_value.remove.assert_called_once_with(force=True)


@pytest.mark.parametrize(
    ("found", "settings", "line"),
    [
        ({"workspace": False}, {}, "the engine has to run on a machine that has the workspace under the same path"),
        ({"unwritable": ["state"]}, {"user": "7:7"}, "expected to write to state .* user 7:7, got no permission; name"),
        ({"gpus": 0}, {"gpus": "all"}, r"\(--gpus all\), got none; install nvidia-container-toolkit"),
        ({"status": 401}, {}, r"status 401.*export PREFECT_API_AUTH_STRING="),
        ({"status": 0, "server": "refused"}, {"network": "br0"}, "got refused; .* from --network host only"),
        ({"status": 0, "server": "timed out"}, {}, "got timed out; is a firewall"),
    ],
)
def test_each_fault_that_a_container_finds_has_its_remedy(
    client: Mock, found: dict[str, Any], settings: dict[str, Any], line: str
) -> None:
    _prints(client, json.dumps(WELL | found))
    with pytest.raises(StageError, match=line) as raised:
        _check(**settings)
    assert "\n" not in str(raised.value)
    assert "the-password" not in str(raised.value)


def test_an_image_that_is_not_there_or_of_another_lock_or_without_python_is_refused(
    client: Mock, capsys: pytest.CaptureFixture[str]
) -> None:
    client.images.get.return_value.labels = {}
    _check()
    assert "does not say of which requirements.lock it is" in capsys.readouterr().err
    client.images.get.return_value.labels = {probe.LOCK_LABEL: "0" * 64}
    with pytest.raises(StageError, match=r"got one of 000000000000; make it anew: make image IMAGE=deepclust:latest$"):
        _check()
    client.images.get.side_effect = ImageNotFound("no such image")
    with pytest.raises(StageError, match=r"the engine has none; make it: make image IMAGE=deepclust:1, or"):
        _check(image="deepclust:1")
    client.images.pull.assert_not_called()
    client.images.pull.side_effect = APIError("denied")
    with pytest.raises(StageError, match=r"can not fetch it \(denied\); log in"):
        _check(image="ghcr.io/me/deepclust:1")


def test_a_container_that_does_not_start_or_run_is_refused_and_removed(client: Mock) -> None:
    _prints(client, "", "exec: python: not found\n")
    with pytest.raises(StageError, match=r"to run Python, it ended with status 0 \(exec: python: not found\); use"):
        _check()
    container = client.containers.create.return_value
    container.start.side_effect = APIError('could not select device driver "" with capabilities: [[gpu]]')
    with pytest.raises(StageError, match="install nvidia-container-toolkit"):
        _check(gpus="all")
    container.start.side_effect = APIError("mounts denied")
    with pytest.raises(StageError, match="to start, got mounts denied; mend"):
        _check()
    assert container.remove.call_count == 3


def test_what_the_container_runs_needs_python_alone(tmp_path: Path) -> None:
    Path("dvc.yaml").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    client = Mock()
    client.version.return_value = {"Version": "27.0.0"}
    _prints(client, json.dumps(WELL))
    probe._find(client, docker.Settings(workspace=tmp_path), url, None)
    _, option, script = client.containers.create.call_args.kwargs["command"]
    command = [sys.executable, "-I", "-S", option, script]
    done = subprocess.run(
        command, env={**os.environ, "PREFECT_API_URL": url}, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert (found["workspace"], found["unwritable"], found["status"]) == (True, [], 0)
    assert "refused" in found["server"]


@pytest.mark.parametrize(
    ("host", "line"),
    [
        ("unix:///no/such.sock", "got nothing there; start the engine, or name its socket: DOCKER_HOST="),
        ("tcp://127.0.0.1:1", "got no answer; start the engine, or mend DOCKER_HOST"),
        ("nonsense", "mend DOCKER_HOST"),
    ],
)
def test_an_engine_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, host: str, line: str) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    with pytest.raises(StageError, match=line) as raised, docker.engine():
        pass
    assert str(raised.value).startswith(f"expected a container engine at {host}, got ")


def test_a_socket_that_this_user_may_not_open_is_one_line() -> None:
    refused = PermissionError(13, "Permission denied")
    line = docker._no_engine("/var/run/docker.sock", refused)
    assert line.startswith("expected a container engine at /var/run/docker.sock, got no permission; join its group")
