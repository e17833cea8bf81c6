"""Threads are a function of the machine, or of a variable that is a number; SIGTERM is an exit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tasks.shared.outputs import environment
from tests.paths import ROOT


def test_the_cores_are_shared_among_the_stages_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cores", lambda: 12)
    monkeypatch.delenv("DEEPCLUST_THREADS", raising=False)
    monkeypatch.setenv("DEEPCLUST_PARALLEL", "")
    assert (environment.parallel(), environment.threads()) == (2, 6)
    monkeypatch.setenv("DEEPCLUST_PARALLEL", "5")
    assert (environment.parallel(), environment.threads()) == (5, 2)
    monkeypatch.setenv("DEEPCLUST_THREADS", "3")
    assert environment.threads() == 3


def test_the_processes_of_a_stage_share_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPCLUST_THREADS", "7")
    shares = []
    for processes in ("1", "2", "3", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        shares.append(environment.threads())
    assert shares == [7, 3, 2, 1]


def test_collective_calls_wait_for_minutes_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPCLUST_COLLECTIVE_SECONDS", raising=False)
    assert environment.collective_seconds() == 300
    monkeypatch.setenv("DEEPCLUST_COLLECTIVE_SECONDS", "7")
    assert environment.collective_seconds() == 7


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5"])
@pytest.mark.parametrize("variable", ["DEEPCLUST_PARALLEL", "DEEPCLUST_THREADS"])
def test_what_is_no_number_of_at_least_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    monkeypatch.delenv("DEEPCLUST_THREADS", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as stop:
        environment.threads()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: expected {variable} to be a number of ")
    assert error.endswith(f"1 or more; got {value!r}; mend or unset it\n")


def test_a_flow_that_is_imported_with_a_wrong_variable_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.pipeline"],
        cwd=ROOT,
        env={**os.environ, "DEEPCLUST_PARALLEL": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
