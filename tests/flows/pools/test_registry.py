"""The server's work pools are looked up and made, and failures are one line."""

from __future__ import annotations

import http.server
import threading

import pytest

from flows.pools import process, registry
from tasks.shared.operations.processes.dvc_runner import StageError


class _Api(http.server.BaseHTTPRequestHandler):
    """Answers with the status in the path, and is healthy as Prefect's."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()
        self.wfile.write(b"true" if self.path.endswith("/health") else b'{"type": "docker"}')


def test_the_pool_is_looked_up_past_the_proxy_and_failures_are_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), _Api) as api:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{api.server_port}"
        assert registry.read(f"{url}/200", None, "mine") == {"type": "docker"}
        assert registry.read(f"{url}/404", None, "mine") is None
        with pytest.raises(StageError, match="to be of type 'process', got 'docker'"):
            registry.make(f"{url}/200", None, process.pool())
        with pytest.raises(StageError, match="got status 500; mend"):
            registry.read(f"{url}/500", None, "mine")
        api.shutdown()
    with pytest.raises(StageError, match="Connection refused"):
        registry.read(url, None, "mine")
