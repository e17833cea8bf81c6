"""What `make serve` leaves in the background is found again, and never mistaken."""

from __future__ import annotations

import http.server
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import serve, server
from tasks.shared.operations.processes.dvc_runner import StageError
from tests.paths import ROOT
from tests.pipelines import eventually, within

URL = "http://127.0.0.1:1/api"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("worker", "server"):
        if pid := serve._pid(name):
            os.kill(pid, signal.SIGKILL)


def test_a_process_in_the_background_is_started_once_replaced_for_another_server_and_stopped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show = ["sh", "-c", "echo $PREFECT_API_URL $PREFECT_API_AUTH_STRING >>asked; exec sleep 60"]
    assert serve._background("worker", show, URL, "me:old") == "started"
    assert serve._background("worker", show, URL, "me:old") == "was running"
    assert eventually(lambda: Path("asked").exists(), 5)
    known, other = f"{URL} me:old\n", "http://127.0.0.1:2/api"
    for url, auth in ((other, "me:old"), (other, "me:new")):
        old = serve._pid("worker")
        assert serve._background("worker", show, url, auth).startswith("restarted")
        assert serve._pid("worker") not in (None, old)
        known += f"{url} {auth}\n"
        assert eventually(lambda known=known: Path("asked").read_text() == known, 5)
    assert (serve.FOLDER / "worker.pid").stat().st_mode & 0o777 == 0o600
    assert "new" not in (serve.FOLDER / "worker.pid").read_text()
    serve.stop()
    assert capsys.readouterr().out == "worker  stopped\nserver  was not running\n"
    assert serve._pid("worker") is None
    (serve.FOLDER / "server.pid").write_text(str(os.getpid()))
    assert serve._pid("server") is None, "the number of another process"


def test_a_worker_is_stopped_with_its_run_for_which_it_would_wait() -> None:
    waits = "import signal, subprocess; signal.signal(15, lambda *_: None); subprocess.run(['sleep', '60'])"
    serve._background("worker", [sys.executable, "-c", waits], URL)
    assert eventually(lambda: [process.name() for process in within(Path())].count("sleep") == 1, 10)
    begin = time.monotonic()
    serve.stop()
    assert time.monotonic() - begin < 15
    assert not within(Path())


class _Api(http.server.BaseHTTPRequestHandler):
    """Answers with the status in the path, and is healthy as Prefect's."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()
        self.wfile.write(b"true" if self.path.endswith("/health") else b'{"type": "docker"}')


def test_the_pool_is_looked_up_past_the_proxy_and_failures_are_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", URL)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), _Api) as api:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        url, free = (f"http://127.0.0.1:{api.server_port + more}" for more in (0, 1))
        assert serve._pool(f"{url}/200", None) == {"type": "docker"}
        assert serve._pool(f"{url}/404", None) is None
        with pytest.raises(StageError, match="to be of type 'process', got 'docker'"):
            serve._make_pool(f"{url}/200", None)
        with pytest.raises(StageError, match="got status 500; mend"):
            serve._pool(f"{url}/500", None)
        with (
            temporary_settings({PREFECT_API_URL: f"{url}/404"}),
            pytest.raises(StageError, match=f"choose another: PREFECT_API_URL={free}/api make serve"),
        ):
            serve._server()
        with temporary_settings({PREFECT_API_URL: f"{url}/200", PREFECT_API_AUTH_STRING: "me:mine"}):
            assert serve._server() == (f"{url}/200", "me:mine", "was running"), "the server that was named"
        monkeypatch.setattr(serve, "LOCAL", f"{url}/200")
        with (
            temporary_settings({PREFECT_API_URL: None}),
            pytest.raises(StageError, match=f"not started here answers there; use it: PREFECT_API_URL={url}/200 make"),
        ):
            serve._server()
        api.shutdown()
    with pytest.raises(StageError, match="Connection refused"):
        serve._pool(url, None)
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

    monkeypatch.setattr(serve, "_background", lambda name, *_, **__: start(name))
    monkeypatch.setattr(serve, "_wait", lambda *_: None)
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
    assert serve.POOL in text
    assert str(ROOT) not in text
