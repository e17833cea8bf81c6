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


def test_what_is_no_number_that_makes_sense_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "cores", lambda: 32)
    counts = (("DEEPCLUST_THREADS", "threads", 128), ("DEEPCLUST_PARALLEL", "stages at once", 128))
    for variable, what, largest in (*counts, ("DEEPCLUST_COLLECTIVE_SECONDS", "seconds", 604800)):
        read = environment.collective_seconds if what == "seconds" else environment.threads
        for value in ("0", "two", "-1", "1e9", str(largest + 1), str(10**30)):
            monkeypatch.setenv(variable, value)
            with pytest.raises(SystemExit, match="2"):
                read()
            expected = f"error: expected {variable} to be a number of {what}, 1 to {largest}; got {value!r}"
            assert capsys.readouterr().err == f"{expected}; mend or unset it\n"
        monkeypatch.setenv(variable, str(largest))
        assert read() >= 1
        monkeypatch.delenv(variable)
    monkeypatch.setenv("DEEPCLUST_THREADS", "9" * 5000)
    with pytest.raises(SystemExit, match="2"):
        environment.threads()
    assert len(capsys.readouterr().err) < 200


def test_seconds_are_looked_at_before_any_process_waits_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *environment.QUIET,
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("DEEPCLUST_COLLECTIVE_SECONDS", "0")
    with pytest.raises(SystemExit, match="2"):
        environment.prepare()


def test_a_small_machine_may_take_the_threads_of_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cores", lambda: 2)
    monkeypatch.setenv("DEEPCLUST_THREADS", "64")
    assert environment.threads() == 64
