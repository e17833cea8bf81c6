"""Who holds the workspace's credential can use its Prefect server; nobody else can, nor another page's script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from flows import pools
from flows.pools import process, registry
from flows.servers import access, server
from tasks.shared.operations.processes.dvc_runner import StageError
from tests import pipelines
from tests.paths import ROOT
from tests.pipelines import within


def _request(
    url: str, auth: str | None = None, *, body: object = None, method: str = "POST", tries: int = 10, **headers: str
) -> Any:
    """Status, origin that a page may have, and what else came; a busy database (503) is asked again."""
    headers = {"Content-Type": "application/json", **headers}
    if auth:
        headers["Authorization"] = access.authorization(auth)
    request = urllib.request.Request(url, json.dumps(body or {}).encode(), headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as reply:
            return reply.status, reply.headers["access-control-allow-origin"], reply.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 503 and tries > 1:
            time.sleep(1)
            return _request(url, auth, body=body, method=method, tries=tries - 1, **headers)
        return error.code, error.headers["access-control-allow-origin"], error.read().decode()


def strangers_are_refused(url: str, auth: str) -> None:
    """Without the string nothing but the health is answered, whatever the page or Host; another page reads nothing."""
    runs, own = f"{url}/flow_runs/filter", url.removesuffix("/api")
    foreign = {"Origin": "http://page.example"}
    assert _request(runs, auth)[0] == 200
    assert _request(runs)[0] == 401
    assert _request(runs, f"{auth}x")[0] == 401
    assert _request(runs, Host="page.example")[0] == 401, "a page whose name was bound to this machine's address"
    assert _request(runs, **foreign)[:2] == (401, None)
    assert _request(runs, auth, **foreign)[:2] == (200, None)
    assert _request(runs, auth, Origin=own)[:2] == (200, own)


def no_command_line_has(auth: str, folder: Path) -> bool:
    """Whether the processes of a workspace, of which there are some, were started without the string in sight."""
    processes = within(folder)
    return bool(processes) and not any(auth in " ".join(process.cmdline()) for process in processes)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """A workspace that `make serve` serves, the server's address, and what was printed."""
    root = tmp_path_factory.mktemp("served")
    pipelines.build(root)
    for name in ("flows", "tasks", "deepclust", "prefect.yaml"):
        (root / name).symlink_to(ROOT / name)
    url = f"http://127.0.0.1:{server._free_port()}/api"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env |= {"PREFECT_API_URL": url, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flows.serve"]
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield root, url, done.stdout
    finally:
        subprocess.run([*command, "--stop"], cwd=root, env=env, stdout=subprocess.DEVNULL, check=True)


def _read(root: Path) -> str:
    assert (root / access.FILE).stat().st_mode & 0o777 == 0o600
    return (root / access.FILE).read_text(encoding="utf-8").strip()


def test_a_served_workspace_refuses_strangers_and_shows_nobody_its_string(served: tuple[Path, str, str]) -> None:
    root, url, printed = served
    auth = _read(root)
    strangers_are_refused(url, auth)
    assert 'export PREFECT_API_AUTH_STRING="$(cat .prefect/auth)"' in printed
    assert auth not in printed
    assert no_command_line_has(auth, root)


def test_a_run_may_not_set_its_command_its_environment_or_what_the_pool_does_not_know(
    served: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, url, _ = served
    auth = _read(root)
    monkeypatch.chdir(root)
    deployment = json.loads(_request(f"{url}/deployments/filter", auth)[2])[0]["id"]
    create = f"{url}/deployments/{deployment}/create_flow_run"
    for variables in ({"command": "true"}, {"env": {"A": "1"}}, {"comand": "true"}):
        status, _, answer = _request(create, auth, body={"job_variables": variables})
        assert status == 422
        assert f"({next(iter(variables))!r} was unexpected)" in answer
    pool = f"{url}/work_pools/{pools.PROCESS}"
    earlier = {"base_job_template": ProcessWorker.get_default_base_job_template()}
    assert _request(pool, auth, body=earlier, method="PATCH")[0] == 204
    registry.make(url, auth, process.pool())
    assert (registry.read(url, auth, pools.PROCESS) or {})["base_job_template"] == process.template()


def test_a_server_that_refuses_or_does_not_answer_is_one_line_with_the_remedy(served: tuple[Path, str, str]) -> None:
    root, url, _ = served
    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: _read(root)}):
        server.admitted(url)
    for string in (None, "deepclust:another"):
        with (
            temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: string}),
            pytest.raises(StageError, match=r'status 401.*export PREFECT_API_AUTH_STRING="\$\(cat .prefect/auth\)"$'),
        ):
            server.admitted(url)
    with pytest.raises(StageError, match="status 401"):
        registry.read(url, None, pools.PROCESS)
    nobody = "http://user:secret@127.0.0.1:1/api"
    with (
        temporary_settings({PREFECT_API_URL: nobody}),
        pytest.raises(
            StageError, match=r"^expected a Prefect server at http://\*\*\*@127.0.0.1:1/api .*unset the variable$"
        ),
    ):
        server.admitted(nobody)


def test_the_credential_is_made_once_and_anew_when_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = os.umask(0)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(lambda _: access.credential(), range(16)))
    finally:
        os.umask(old)
    assert found == {_read(tmp_path)}
    assert access.HOME.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in access.HOME.iterdir()] == ["auth"]
    access.FILE.unlink()
    assert access.credential() not in found


@pytest.mark.parametrize("what", ["open", "short", "folder", "link", "pipe", "binary"])
def test_a_file_that_others_may_have_read_or_that_holds_no_credential_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    access.credential()
    if what == "open":
        access.FILE.chmod(0o640)
    elif what in ("short", "binary"):
        access.FILE.write_bytes(b"me:pass" if what == "short" else b"\xff\x00:" * 20)
    else:
        access.FILE.rename("elsewhere")
        make = {"folder": Path.mkdir, "link": lambda path: path.symlink_to("elsewhere"), "pipe": os.mkfifo}[what]
        make(access.FILE)
    with pytest.raises(StageError, match=r"^expected .prefect/auth to be .*, got .*; remove it: .* makes a new one$"):
        access.credential()
