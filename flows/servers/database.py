"""The database of this workspace's Prefect servers, looked at before one is started: it would only print tracebacks."""

from __future__ import annotations

import os
import re
import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from flows.servers import access
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.text import safe

FILE = access.HOME / "prefect.db"
_ELSEWHERE = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
_REMEDY = f"move {FILE}* away: the next start makes a new one, without the history of runs, which no result depends on"


def check() -> None:
    """Refuse a database that the installed Prefect can not use. An older one it migrates itself.

    Raises:
        StageError: If the file is damaged, or a newer Prefect's.
    """
    if not FILE.exists() or any(name in os.environ for name in _ELSEWHERE):
        return
    try:
        with closing(sqlite3.connect(f"{FILE.absolute().as_uri()}?mode=rw", uri=True, timeout=5)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            found = database.execute("SELECT version_num FROM alembic_version").fetchone() if tables else None
    except sqlite3.Error as error:
        raise StageError(f"expected Prefect's database in {FILE}, got: {safe(str(error))}; {_REMEDY}") from error
    if found and str(found[0]) not in _known():
        raise StageError(
            f"expected {FILE} to be of this Prefect or an older one, got schema {safe(str(found[0]))}, which it does "
            f"not know; use the Prefect that wrote it, or {_REMEDY}"
        )


def _known() -> set[str]:
    """The schemas of the installed Prefect."""
    spec = find_spec("prefect.server.database")
    assert spec
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / "_migrations/versions/sqlite"
    texts = (file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    return {found[1] for text in texts if (found := re.search(r'^revision(?:: str)? = "(\w+)"', text, re.MULTILINE))}
