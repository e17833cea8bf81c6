"""One Prefect server for the whole session: it takes 11 to 21 s to start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from tests import pipelines


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def root(prefect: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A throw-away pipeline as the current folder, without tracking."""
    pipelines.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    return tmp_path
