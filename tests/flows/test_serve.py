"""`make serve` starts a server of this workspace, and mistakes no other for it."""

from __future__ import annotations

import http.server
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import pools, serve
from flows.servers import background, server
from tasks.shared.operations.processes.dvc_runner import StageError
from tests.paths import ROOT
from tests.pipelines import eventually


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class _Api(http.server.BaseHTTPRequestHandler):
    """Answers with the status in the path, and is healthy as Prefect's."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()
        self.wfile.write(b"true" if self.path.endswith("/health") else b"{}")


def test_a_server_that_was_not_started_here_is_used_only_where_it_is_named() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Api) as api, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        url, free = (f"http://127.0.0.1:{api.server_port + more}" for more in (0, 1))
        with (
            temporary_settings({PREFECT_API_URL: f"{url}/404"}),
            pytest.raises(StageError, match=f"choose another: PREFECT_API_URL={free}/api make serve"),
        ):
            serve._server()
        with temporary_settings({PREFECT_API_URL: f"{url}/200", PREFECT_API_AUTH_STRING: "me:mine"}):
            assert serve._server() == (f"{url}/200", "me:mine", "was running"), "the server that was named"
        patch.setattr(serve, "LOCAL", f"{url}/200")
        with (
            temporary_settings({PREFECT_API_URL: None}),
            pytest.raises(StageError, match=f"not started here answers there; use it: PREFECT_API_URL={url}/200 make"),
        ):
            serve._server()
        api.shutdown()
    with (
        temporary_settings({PREFECT_API_URL: "http://server.invalid:4200/api"}),
        pytest.raises(StageError, match=r"none answers; start it, or unset PREFECT_API_URL$"),
    ):
        serve._server()


def test_two_servers_of_a_workspace_are_not_started_at_once_for_they_would_migrate_its_database_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    go = threading.Event()

    def start(name: str) -> None:
        started.append(name)
        assert go.wait(30)

    monkeypatch.setattr(background, "start", lambda name, *_, **__: start(name))
    monkeypatch.setattr(background, "wait", lambda *_: None)
    monkeypatch.setattr(serve, "PREFECT_API_URL", Mock(value=lambda: None))  # other tests have a server
    monkeypatch.setattr(server.child_processes.ChildProcesses, "start", lambda *_, **__: start("flow's"))
    monkeypatch.setattr(server, "answers", lambda _: True)
    monkeypatch.setattr(serve, "LOCAL", f"http://127.0.0.1:{server._free_port()}/api")
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(server._start, ()), pool.submit(serve._server)]
        assert eventually(lambda: bool(started), 10)
        time.sleep(0.5)
        assert len(started) == 1
        go.set()
        for each in both:
            each.result()
    assert sorted(started) == ["flow's", "server"]


def test_the_deployment_names_no_folder_of_this_machine() -> None:
    text = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
    assert pools.PROCESS in text
    assert str(ROOT) not in text
