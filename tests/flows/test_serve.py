"""What `make serve` leaves in the background is found again, and never mistaken."""

from __future__ import annotations

import http.server
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import serve
from tasks.shared.operations.processes.dvc_runner import StageError
from tests.paths import ROOT
from tests.pipelines import eventually

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
    show = ["sh", "-c", "echo $PREFECT_API_URL >>urls; exec sleep 60"]
    assert serve._background("worker", show, URL) == "started"
    assert serve._background("worker", show, URL) == "was running"
    assert eventually(lambda: Path("urls").exists(), 5)
    old, other = serve._pid("worker"), "http://127.0.0.1:2/api"
    assert serve._background("worker", show, other).startswith("restarted")
    assert serve._pid("worker") not in (None, old)
    assert eventually(lambda: Path("urls").read_text() == f"{URL}\n{other}\n", 5)
    serve.stop()
    assert capsys.readouterr().out == "worker  stopped\nserver  was not running\n"
    assert serve._pid("worker") is None
    (serve.FOLDER / "server.pid").write_text(str(os.getpid()))
    assert serve._pid("server") is None, "the number of another process"


class _Api(http.server.BaseHTTPRequestHandler):
    """Answers with the status in the path."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()


def test_the_pool_is_looked_up_past_the_proxy_and_failures_are_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", URL)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), _Api) as api:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        url, free = (f"http://127.0.0.1:{api.server_port + more}" for more in (0, 1))
        assert serve._has_pool(f"{url}/200")
        assert not serve._has_pool(f"{url}/404")
        with pytest.raises(StageError, match="got status 500; mend"):
            serve._has_pool(f"{url}/500")
        with pytest.raises(StageError, match=f"choose another: PREFECT_API_URL={free}/api make serve"):
            serve._server(f"{url}/404")
        api.shutdown()
    with pytest.raises(StageError, match="Connection refused"):
        serve._has_pool(url)
    with pytest.raises(StageError, match=r"none answers; start it, or unset PREFECT_API_URL$"):
        serve._server("http://server.invalid:4200/api")


def test_the_deployment_names_no_folder_of_this_machine() -> None:
    text = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
    assert serve.POOL in text
    assert str(ROOT) not in text
