"""What is left in the background is found again, and never mistaken."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import serve
from flows.servers import background
from tests.pipelines import eventually, within

URL = "http://127.0.0.1:1/api"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("worker", "server"):
        if pid := background.pid(name):
            os.kill(pid, signal.SIGKILL)


def test_a_process_in_the_background_is_started_once_replaced_for_another_server_and_stopped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show = ["sh", "-c", "echo $PREFECT_API_URL $PREFECT_API_AUTH_STRING >>asked; exec sleep 60"]
    assert background.start("worker", show, URL, "me:old") == "started"
    assert background.start("worker", show, URL, "me:old") == "was running"
    assert eventually(lambda: Path("asked").exists(), 5)
    known, other = f"{URL} me:old\n", "http://127.0.0.1:2/api"
    for url, auth in ((other, "me:old"), (other, "me:new")):
        old = background.pid("worker")
        assert background.start("worker", show, url, auth).startswith("restarted")
        assert background.pid("worker") not in (None, old)
        known += f"{url} {auth}\n"
        assert eventually(lambda known=known: Path("asked").read_text() == known, 5)
    assert (background.FOLDER / "worker.pid").stat().st_mode & 0o777 == 0o600
    assert "new" not in (background.FOLDER / "worker.pid").read_text()
    serve.stop()
    assert capsys.readouterr().out == "worker        stopped\nserver        was not running\n"
    assert background.pid("worker") is None
    (background.FOLDER / "server.pid").write_text(str(os.getpid()))
    assert background.pid("server") is None, "the number of another process"


def test_a_worker_is_stopped_with_its_run_for_which_it_would_wait() -> None:
    waits = "import signal, subprocess; signal.signal(15, lambda *_: None); subprocess.run(['sleep', '60'])"
    background.start("worker", [sys.executable, "-c", waits], URL)
    assert eventually(lambda: [process.name() for process in within(Path())].count("sleep") == 1, 10)
    begin = time.monotonic()
    serve.stop()
    assert time.monotonic() - begin < 15
    assert not within(Path())
