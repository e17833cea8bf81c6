"""Threads are a function of the machine, or of a variable that is a number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tasks.shared.outputs import environment
from tests.paths import ROOT


def test_the_cores_are_shared_among_the_stages_at_once_and_the_processes_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "cores", lambda: 12)
    monkeypatch.delenv("DEEPCLUST_THREADS", raising=False)
    monkeypatch.setenv("DEEPCLUST_PARALLEL", "")
    assert (environment.parallel(), environment.threads()) == (2, 6)
    monkeypatch.setenv("DEEPCLUST_PARALLEL", "5")
    assert (environment.parallel(), environment.threads()) == (5, 2)
    monkeypatch.setenv("DEEPCLUST_THREADS", "7")
    for processes, share in ((1, 7), (2, 3), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert environment.threads() == share


def test_collective_calls_wait_for_minutes_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPCLUST_COLLECTIVE_SECONDS", raising=False)
    assert environment.collective_seconds() == 300
    monkeypatch.setenv("DEEPCLUST_COLLECTIVE_SECONDS", "7")
    assert environment.collective_seconds() == 7


def test_what_is_no_number_of_at_least_one_is_one_line_when_a_flow_is_imported_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in ("0", "two", "1.5"):
        monkeypatch.setenv("DEEPCLUST_THREADS", value)
        with pytest.raises(SystemExit) as stop:
            environment.threads()
        assert stop.value.code == 2
        expected = "error: expected DEEPCLUST_THREADS to be a number of threads, 1 or more"
        assert capsys.readouterr().err == f"{expected}; got {value!r}; mend or unset it\n"
    wrong = {**os.environ, "DEEPCLUST_PARALLEL": "0"}
    done = subprocess.run([sys.executable, "-m", "flows.pipeline"], cwd=ROOT, env=wrong, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
