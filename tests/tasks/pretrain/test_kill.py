"""Processes that are killed by SIGKILL: the short version of benchmarks/kill_test.py, and what it relies on."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from benchmarks import kill_test

METHOD = "pcl"


def test_two_processes_that_are_killed_end_bit_for_bit(tmp_path: Path) -> None:
    short = [f"pretrain.{METHOD}.{edit}" for edit in ("epochs=2", "warmup_epochs=0")]
    workspace = kill_test.Workspace(tmp_path / "run", processes=2, edits=short)
    straight = workspace.measured(METHOD)
    for kind, seed, whole in (("forward", 0, False), ("saving", 4, True), ("E-step", 0, False)):
        kill = workspace.kill(METHOD, kind, straight, random.Random(f"{kind}{seed}"), whole=whole)
        assert not kill.wrong, kill
        assert kill.resumed > 0, f"expected a moment after the first checkpoint, change the seed: {kill}"


def _watched(last: tuple[int, int] | None) -> tuple[list[int], list[str]]:
    """Three calls to a function with four calls inside: how many were counted in each, and the ends."""
    ends: list[str] = []

    def counts(event: str, called: Any) -> bool:
        return event == "c_call" and called is math.sqrt

    def work() -> None:
        for _ in range(4):
            math.sqrt(2)
        math.floor(2.5)

    phase = kill_test.Phase(counts, last, ends.append)
    watched = phase.around(work)
    for _ in range(3):
        watched()
    return phase.found, ends


def test_what_is_counted_in_one_run_is_where_the_next_one_ends() -> None:
    assert _watched(None) == ([4, 4, 4], [])
    assert _watched((1, 2))[1][0] == "call 1, at sqrt (2)"


def test_a_function_with_fewer_calls_than_were_counted_is_still_the_last() -> None:
    assert _watched((1, 9))[1] == ["call 1, at its end"]


def test_the_table_counts_identical_runs_by_method_and_kind() -> None:
    def kill(kind: str, wrong: str) -> kill_test.Kill:
        return kill_test.Kill(method="pcl", kind=kind, where="", newest=3, resumed=3, wrong=wrong, seconds=1.0)

    kills = [kill("forward", ""), kill("forward", "differs in x"), kill("all ranks", "")]
    assert kill_test.table(kills, 1).splitlines()[0] == "| method | forward | saving | E-step | all ranks | all |"
    assert kill_test.table(kills, 1).splitlines()[2] == "| pcl | 1 of 2 | 0 of 0 | 0 of 0 | 1 of 1 | 2 of 3 |"
