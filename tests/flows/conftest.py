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


_PREEMPTED = """
echo $1 ${DEEPCLUST_RESUME-auto} >>resumes
case $1 in prepare|report) marker=state/$1/preempted;; *) marker=state/embed/$1/preempted;; esac
if [ $(cat left) -gt 0 ]; then
  echo $(($(cat left) - 1)) >left
  mkdir -p $(dirname $marker)
  echo $1 >>state/ran
  touch $marker
  exit 143
fi
"""


def preempt(root: Path, *, times: int) -> None:
    """Let the next stages that run end as preempted, so many times; `resumes` notes what each was told of its state."""
    (root / "left").write_text(str(times), encoding="utf-8")
    (root / "stage.sh").write_text(_PREEMPTED + (root / "stage.sh").read_text(encoding="utf-8"), encoding="utf-8")
