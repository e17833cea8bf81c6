"""Faults of each kind, answered by one line or the right result: the short version of `python -m benchmarks.faults`."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import __main__ as faults
from benchmarks.faults import cases, kills
from benchmarks.faults.cases import EITHER, LINE, SAME, Case, Reference
from benchmarks.faults.running import Ended
from tests.paths import ROOT

SHORT = (
    "file: artifacts/embed/swav/train.npy is cut × linear",
    "file: artifacts/cluster/swav/centroids.npy is one axis more × assign",
    "file: artifacts/pretrain/swav/lineage.json is a list × embed",
    "parameters: data.test_fraction: .nan × check",
    "parameters: params.yaml is not UTF-8 × prepare",
    "folder: data.folder is a broken link × prepare",
    "image: said to be 100,000 pixels wide × assign",
    "image: a cut PNG × prepare",
    "name: an image with a command × prepare",
    "argument: a way out × linear",
    "override: an unknown key × overrides",
    "environment: DEEPCLUST_THREADS=many × prepare",
    "disk: full after 64 bytes of a file × embed",
    "meanwhile: others' parameters change × embed",
)


def test_a_dozen_faults_are_answered_by_one_line_or_the_right_result(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    only = "|".join(f"^{re.escape(name)}$" for name in SHORT)
    command = [sys.executable, "-m", "benchmarks.faults", "--only", only, "--kills", "0", "--table", str(table)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(f"{row['fault']} × {row['command']}" for row in rows) == sorted(SHORT)
    # torch keeps a folder of its own there
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("torchinductor_")] == [table]


def test_the_list_has_every_kind_and_no_case_twice() -> None:
    names = [case.name for case in faults.every()]
    assert len(names) == len(set(names)) >= 300
    kinds = {name.partition(":")[0] for name in names}
    assert kinds == {
        *("file", "parameters", "folder", "image", "name", "labels", "argument", "override", "output"),
        *("environment", "tracking", "disk", "meanwhile", "state", "DVC's cache"),
    }


def test_forty_kills_meet_every_stage_signal_and_moment_and_all_that_can_be_killed() -> None:
    planned = kills.plan(40, seed=0)
    assert [kill.number for kill in planned] == list(range(40))
    assert {kill.what for kill in planned} == set(kills.PLAN)
    assert {kill.signal for kill in planned} == set(kills.SIGNALS)
    assert {kill.stage for kill in planned} == set(kills.STAGES)
    assert {kill.moment for kill in planned} == set(kills.MOMENTS)


@pytest.mark.parametrize(
    ("right", "status", "err", "out", "expected"),
    [
        (LINE, 2, "error: expected a, got b\n", "", "line"),
        (LINE, 2, "warning: c\nerror: expected a, got b\n", "", "line"),
        (LINE, 2, "error: expected a\ngot b\n", "", "lines"),
        (LINE, 1, "error: expected a\n", "", "status"),
        (LINE, 2, "", "", "silent"),
        (LINE, 0, "", "another", "silent"),
        (LINE, 2, "expected a\n", "", "form"),
        (LINE, 1, "Traceback (most recent call last):\n  x\nValueError: a\n", "", "traceback"),
        (LINE, 2, "error: \x1b[31m\n", "", "control"),
        (LINE, -11, "", "", "crash"),
        (LINE, None, "", "", "hang"),
        (EITHER, 0, "", "table", "same"),
        (EITHER, 0, "", "another", "silent"),
        (SAME, 0, "warning: c\n", "table", "same"),
    ],
)
def test_an_answer_is_judged(tmp_path: Path, right: str, status: int | None, err: str, out: str, expected: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "there").touch()
    case = Case(fault="none", command="check", right=right)
    ended = Ended(status=status, out=out, err=err, seconds=0.0)
    verdict = cases.judge(case, tmp_path, ended, Reference(files={}, out="table"))
    assert verdict.what == expected
    assert verdict.good == (expected in ("line", "same"))


def test_what_a_command_leaves_behind_or_starts_by_a_name_is_seen(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "there").touch()
    case, ended = Case(fault="none", command="check"), Ended(status=2, out="", err="error: a\n", seconds=0.0)
    assert cases.judge(case, tmp_path, ended, None).what == "line"
    (tmp_path / "work/.x.partial").mkdir()
    assert cases.judge(case, tmp_path, ended, None).what == "left"
    (tmp_path / "work" / cases.SPOILT).touch()
    assert cases.judge(case, tmp_path, ended, None).what == "shell"
