"""Two flows started together, and a flow that loses its server, with real servers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.servers import access
from tests import pipelines
from tests.flows.servers.test_access import no_command_line_has, strangers_are_refused
from tests.paths import ROOT
from tests.pipelines import eventually, within

# The command, with less patience for a server that does not answer.
_FLOW = "from flows import pipeline; from flows.servers import watchdog; watchdog.PATIENCE = 4; pipeline.main()"


def test_a_second_flow_is_refused_while_the_server_starts_and_a_lost_server_ends_the_first_with_its_results_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipelines.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage.sh").write_text(
        (tmp_path / "stage.sh").read_text().replace("python -c 'import time; time.sleep(60)'", ": >asleep; read _ <go")
    )
    (tmp_path / "slow").touch()
    os.mkfifo(tmp_path / "go")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env |= {"PYTHONPATH": str(ROOT), "DEEPCLUST_TRACKING": "off"}
    flows: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _FLOW, "--stages", "prepare"]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        flows.append(subprocess.Popen(command, cwd=tmp_path, env=env, **streams))
        return flows[-1]

    try:
        first = start()
        assert eventually((access.HOME / "server.log").exists, 120)
        second = start()
        _, line = second.communicate(timeout=180)
        assert second.returncode == 2
        assert line.startswith("error: expected to be the only flow in")
        assert f"one already runs there (process {first.pid})" in line
        assert line.count("\n") == 1

        assert eventually((tmp_path / "asleep").exists, 120)
        server = next(process for process in within(tmp_path) if _serves(process))
        auth = (tmp_path / access.FILE).read_text().strip()
        port = server.cmdline()[server.cmdline().index("--port") + 1]
        strangers_are_refused(f"http://127.0.0.1:{port}/api", auth)
        assert no_command_line_has(auth, tmp_path)

        server.kill()
        time.sleep(6)
        assert first.poll() is None, "its stage still runs"
        (tmp_path / "go").write_text("\n")
        begin = time.monotonic()
        _, printed = first.communicate(timeout=60)
        assert time.monotonic() - begin < 30
        assert first.returncode == 1
        assert printed.splitlines()[-1].startswith(f"error: Prefect's server at http://127.0.0.1:{port}/api no longer")
        assert printed.count("rror") == 1, printed
        assert "Traceback" not in printed
        assert "prepare  run" in printed
        assert (tmp_path / "artifacts/prepare").exists()
        assert "prepare" in (tmp_path / "dvc.lock").read_text()
        assert eventually(lambda: not within(tmp_path), 15)
    finally:
        for flow in flows:
            flow.kill()


def _serves(process: psutil.Process) -> bool:
    """Whether this is the server, and not the supervisor that started it."""
    command = process.cmdline()
    return "prefect" in command and "server" in command and not any("supervisor" in word for word in command)
