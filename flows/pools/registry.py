"""The work pools as Prefect's server knows them."""

from __future__ import annotations

import http.client
import json
import urllib.error
from typing import Any

from flows import server
from tasks.shared.operations.processes.dvc_runner import StageError


def read(url: str, auth: str | None, name: str) -> dict[str, Any] | None:
    """The work pool as the server knows it, None if there is none.

    Raises:
        StageError: If the server refuses the request, or is none of Prefect's.
    """
    return _asked(url, auth, "GET", f"work_pools/{name}")


def make(url: str, auth: str | None, name: str, kind: str, template: dict[str, Any]) -> None:
    """Make the work pool, or give one of an earlier version today's template.

    Raises:
        StageError: As `read`; if there is one of another type.
    """
    pool = read(url, auth, name)
    if pool is None:
        _asked(url, auth, "POST", "work_pools/", {"name": name, "type": kind, "base_job_template": template})
    elif pool.get("type") != kind:
        raise StageError(
            f"expected the work pool {name} at {url} to be of type {kind!r}, got {pool.get('type')!r}; delete it"
        )
    elif pool.get("base_job_template") != template:
        _asked(url, auth, "PATCH", f"work_pools/{name}", {"base_job_template": template})


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
