"""A workspace that `make serve` serves, and the requests by which a test uses it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from flows.servers import access, server
from tests.services import workspaces

ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Served:
    """A workspace with its server and worker.

    Attributes:
        root: The workspace.
        url: Address of the API, `http://…/api`.
        auth: What the server asks for, `user:password`.
        environment: With which Prefect's commands and `flows.pipeline` use this server.
        printed: By `make serve`.
    """

    root: Path
    url: str
    auth: str
    environment: dict[str, str]
    printed: str

    def request(self, path: str, body: object = None, *, method: str = "POST") -> Any:
        """What the API answers. A busy database is asked again; so is, to read, a server that drops a connection."""
        for _ in range(30):
            try:
                reply = httpx.request(
                    method,
                    f"{self.url}/{path}",
                    json=body if method != "GET" else None,
                    headers={"Authorization": access.authorization(self.auth)},
                    timeout=60,
                    trust_env=False,
                )
            except httpx.ReadError:
                if method != "GET":
                    raise
                time.sleep(1)
                continue
            if reply.status_code != 503:
                break
            time.sleep(1)
        assert reply.is_success, f"{path}: {reply.status_code} {reply.text}"
        return reply.json() if reply.content else None

    def start(self, deployment: str, **parameters: object) -> str:
        """Start a run of a deployment, `pretrain-and-eval/docker`; its id."""
        number = self.request(f"deployments/name/{deployment}", method="GET")["id"]
        run = self.request(f"deployments/{number}/create_flow_run", {"parameters": parameters})
        return str(run["id"])

    def run(self, number: str) -> dict[str, Any]:
        """A flow run as the server knows it."""
        found: dict[str, Any] = self.request(f"flow_runs/{number}", method="GET")
        return found

    def has_ended(self, number: str) -> bool:
        """Whether a flow run has ended, however."""
        return self.run(number)["state"]["type"] in ENDED

    def ended(self, number: str, seconds: float = 900) -> dict[str, Any]:
        """A flow run once it has ended. It fails the test if it does not in time."""
        deadline = time.monotonic() + seconds
        while (run := self.run(number))["state"]["type"] not in ENDED:
            assert time.monotonic() < deadline, f"{run['name']} is {run['state']['name']}\n{self.logs(number)}"
            time.sleep(0.2)
        return run

    def cancel(self, number: str) -> None:
        """Ask for a flow run to be cancelled, as the UI and `prefect flow-run cancel` do."""
        self.request(f"flow_runs/{number}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def stages(self, since: str = "1970-01-01T00:00:00Z") -> list[dict[str, Any]]:
        """The runs of the flow `stage`, the first first, that were made since a time."""
        wanted = {"flows": {"name": {"any_": ["stage"]}}, "sort": "START_TIME_ASC"}
        found = self.request("flow_runs/filter", wanted)
        return [run for run in found if run["created"] >= since]

    def logs(self, number: str) -> str:
        """What a flow run has logged."""
        wanted = {"logs": {"flow_run_id": {"any_": [number]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return "\n".join(line["message"] for line in self.request("logs/filter", wanted))


@contextmanager
def serving(root: Path, *options: str, **variables: str) -> Iterator[Served]:
    """Serve a workspace on a free port, as `make serve ARGS=…` does.

    Args:
        root: The workspace.
        options: Of `python -m flows.serve`.
        variables: Added to the environment.
    """
    url = f"http://127.0.0.1:{server._free_port()}/api"
    command = [sys.executable, "-m", "flows.serve"]
    variables["PREFECT_API_URL"] = url
    try:
        printed = workspaces.run(root, *command, *options, **variables).stdout
        auth = (root / access.FILE).read_text(encoding="utf-8").strip()
        environment = workspaces.environment(root, **variables, PREFECT_API_AUTH_STRING=auth)
        yield Served(root, url, auth, environment, printed)
    finally:
        workspaces.run(root, *command, "--stop", **variables)
