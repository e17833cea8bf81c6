"""The work pools as Prefect's server knows them."""

from __future__ import annotations

import http.client
import json
import urllib.error
from typing import Any

from flows.pools import Pool
from flows.servers import server
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.text import masked


def read(url: str, auth: str | None, name: str) -> dict[str, Any] | None:
    """The work pool as the server knows it, None if there is none.

    Raises:
        StageError: If the server refuses the request, or is none of Prefect's.
    """
    return _asked(url, auth, "GET", f"work_pools/{name}")


def make(url: str, auth: str | None, pool: Pool) -> None:
    """Make the work pool with its queues, or give one of an earlier version today's template and limits.

    Raises:
        StageError: As `read`; if there is one of another type.
    """
    known = read(url, auth, pool.name)
    if known is None:
        what = {"name": pool.name, "type": pool.kind, "base_job_template": pool.template}
        _asked(url, auth, "POST", "work_pools/", what)
    elif known.get("type") != pool.kind:
        raise StageError(
            f"expected the work pool {pool.name} at {masked(url)} to be of type {pool.kind!r}, got "
            f"{known.get('type')!r}; delete it: prefect work-pool delete {pool.name}"
        )
    elif known.get("base_job_template") != pool.template:
        _asked(url, auth, "PATCH", f"work_pools/{pool.name}", {"base_job_template": pool.template})
    for queue, limit in pool.queues.items():
        queues = f"work_pools/{pool.name}/queues"
        if _asked(url, auth, "GET", f"{queues}/{queue}") is None:
            _asked(url, auth, "POST", queues, {"name": queue, "concurrency_limit": limit})
        else:
            _asked(url, auth, "PATCH", f"{queues}/{queue}", {"concurrency_limit": limit})


def _asked(url: str, auth: str | None, method: str, path: str, body: object = None) -> dict[str, Any] | None:
    """The server's answer, None if what is asked for is not there."""
    try:
        with server.request(f"{url}/{path}", seconds=10, auth=auth, method=method, body=body) as reply:
            answer = json.loads(reply.read() or "{}")
            return answer if isinstance(answer, dict) else {}
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        if error.code == 401:
            raise StageError(server.refused(url)) from error
        raise StageError(
            f"expected Prefect's API at {url}, got status {error.code}; mend PREFECT_API_URL or the server there"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise StageError(
            f"expected Prefect's API at {url}, got {why}; is the server there healthy? run again"
        ) from error
