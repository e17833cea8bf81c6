"""Threads are a function of the machine, or of a variable that is a number."""

from __future__ import annotations

import pytest

from tasks.shared.outputs import environment


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


def test_what_is_no_number_of_at_least_one_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in ("0", "two"):
        monkeypatch.setenv("DEEPCLUST_THREADS", value)
        with pytest.raises(SystemExit, match="2"):
            environment.threads()
        expected = "error: expected DEEPCLUST_THREADS to be a number of threads, 1 or more"
        assert capsys.readouterr().err == f"{expected}; got {value!r}; mend or unset it\n"
