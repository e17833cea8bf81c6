"""The Docker pool's containers are as they were fixed, and a run can set nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration

from flows.pools.docker import Settings, template
from flows.pools.docker_worker import Worker
from tasks.shared.operations.processes.dvc_runner import StageError


class _Engine(BaseHTTPRequestHandler):
    """Keeps what it is asked to create."""

    created: ClassVar[dict[str, Any]] = {}

    def do_GET(self) -> None:
        self._answer({"ApiVersion": "1.44", "Version": "27.0.0", "Id": "c1", "State": {"Status": "created"}})

    def do_POST(self) -> None:
        if "/containers/create" in self.path:
            type(self).created = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer({"Id": "c1"})

    def _answer(self, what: object) -> None:
        body = json.dumps(what).encode()
        self.send_response(201)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Engine]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_port}")
        yield _Engine
        server.shutdown()


def _configuration(settings: Settings, api: str = "http://127.0.0.1:4200/api") -> DockerWorkerJobConfiguration:
    """What Prefect's worker makes of the template for a run."""
    made = asyncio.run(DockerWorkerJobConfiguration.from_template_and_values(template(settings), {}, client=Mock()))
    with temporary_settings({PREFECT_API_URL: api, PREFECT_API_AUTH_STRING: "me:the-password"}):
        made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="run"))
    return made


def test_the_engine_is_asked_for_what_the_settings_say(engine: type[_Engine], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "data").mkdir()
    workspace, data = tmp_path / "work", tmp_path / "data"
    settings = Settings(
        workspace=workspace, gpus="all", user="1001:1002", shared_memory="2g", mounts=(str(data), f"{tmp_path}:rw")
    )
    worker = Worker(work_pool_name="any", test_mode=True)
    client = worker._get_client()
    worker._create_container(client, **worker._build_container_settings(client, _configuration(settings)))
    asked, host = engine.created, engine.created["HostConfig"]
    assert asked["Image"] == "deepclust:latest"
    assert asked["Cmd"] == ["python", "-m", "flows.container"]
    assert (asked["User"], asked["WorkingDir"]) == ("1001:1002", str(workspace))
    assert host["Binds"] == [f"{workspace}:{workspace}", f"{data}:{data}:ro", f"{tmp_path}:{tmp_path}"]
    assert (host["NetworkMode"], host["ShmSize"]) == ("host", 2 * 2**30)
    assert not host.get("Privileged")
    assert not host.get("AutoRemove"), "its exit status would be lost"
    (gpus,) = host["DeviceRequests"]
    assert (gpus["Count"], gpus["DeviceIDs"]) == (-1, [])
    assert gpus["Capabilities"] == [["gpu", "compute", "utility"]]
    environment = dict(line.split("=", 1) for line in asked["Env"])
    assert environment["PREFECT_API_AUTH_STRING"] == "me:the-password", "the worker's own, by environment"
    assert environment["PREFECT_HOME"].startswith("/tmp/")
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


def test_containers_of_two_runs_of_one_name_have_names_of_their_own(engine: type[_Engine], tmp_path: Path) -> None:
    worker = Worker(work_pool_name="any", test_mode=True)
    client, configuration = worker._get_client(), _configuration(Settings(workspace=tmp_path))
    names = {worker._build_container_settings(client, configuration)["name"] for _ in range(2)}
    assert len(names) == 2
    assert all(name.startswith("run-") for name in names)


def test_the_pool_keeps_no_credential_and_lets_a_run_set_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = DockerWorker.get_default_base_job_template()["job_configuration"]
    with temporary_settings({PREFECT_API_AUTH_STRING: "me:the-password"}):
        made = template(Settings(workspace=tmp_path))
    assert made["job_configuration"].keys() <= known.keys(), "what the worker would not know"
    assert "{{" not in json.dumps(made), "a placeholder, which a run could fill"
    assert "the-password" not in json.dumps(made)
    assert made["variables"] == {"type": "object", "properties": {}, "additionalProperties": False}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow:5000")
    with pytest.raises(StageError, match=r"^MLFLOW_TRACKING_URI: expected an address without a password.*\*\*\*@"):
        template(Settings(workspace=tmp_path))


def test_without_gpus_none_is_given_and_the_workspaces_owner_is_the_user(tmp_path: Path) -> None:
    made = template(Settings(workspace=tmp_path))["job_configuration"]
    owner = tmp_path.stat()
    assert made["container_create_kwargs"] == {
        "user": f"{owner.st_uid}:{owner.st_gid}",
        "working_dir": str(tmp_path),
        "shm_size": "8g",
    }
    assert made["env"]["NVIDIA_VISIBLE_DEVICES"] == "void", "else an engine with NVIDIA's runtime gives all"


@pytest.mark.parametrize(
    ("image", "policy"),
    [
        ("deepclust", "Never"),
        ("localhost/deepclust:1", "Never"),
        ("me/deepclust:1", "Never"),
        ("ghcr.io/me/deepclust:1", "IfNotPresent"),
        ("registry:5000/deepclust", "IfNotPresent"),
    ],
)
def test_only_an_image_of_a_named_registry_is_pulled(tmp_path: Path, image: str, policy: str) -> None:
    made = template(Settings(workspace=tmp_path, image=image))["job_configuration"]
    assert made["image_pull_policy"] == policy


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gpus", "2"),
        ("image", "-v/:/host"),
        ("user", "root"),
        ("shared_memory", "much"),
        ("mounts", ("data",)),
        ("mounts", ("/no/such/folder",)),
        ("mounts", ("/tmp:/etc",)),
        ("network", "host,none"),
    ],
)
def test_a_value_that_an_engine_would_refuse_is_one_line(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(StageError, match=r"^[-A-Za-z_]+: expected .*, got .*; mend it$"):
        Settings(workspace=tmp_path, **{option: value})
