"""A database that Prefect could not use is refused in one line, before a server is started."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from flows.servers import database
from tasks.shared.operations.processes.dvc_runner import StageError


def _make(schema: str) -> None:
    database.FILE.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(database.FILE)) as file, file:
        file.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        file.execute("INSERT INTO alembic_version VALUES (?)", (schema,))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in database._ELSEWHERE:
        monkeypatch.delenv(name, raising=False)


def test_a_schema_of_a_newer_prefect_is_refused_and_an_older_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    database.check()
    assert not database.FILE.exists()
    _make("9725c1cbee35")  # Prefect 2.0's first
    database.check()
    database.FILE.unlink()
    _make("ffffffffffff")
    with pytest.raises(StageError, match=r"^expected \.prefect/prefect\.db to be of this Prefect.*ffffffffffff.*move"):
        database.check()
    monkeypatch.setenv(database._ELSEWHERE[0], "postgresql+asyncpg://somewhere")
    database.check()


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + b"\1" * 4096])
def test_a_damaged_file_is_refused_with_the_remedy(content: bytes) -> None:
    database.FILE.parent.mkdir()
    database.FILE.write_bytes(content)
    with pytest.raises(StageError, match=r"^expected Prefect's database in .*, got: .*; move .prefect.* away"):
        database.check()
    assert database.FILE.read_bytes() == content
