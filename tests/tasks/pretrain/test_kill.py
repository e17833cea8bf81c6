"""A process that is killed by SIGKILL: the short version of benchmarks/kill_test.py."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks import kill_test


def test_one_of_two_processes_is_killed_and_the_run_ends_bit_for_bit(tmp_path: Path) -> None:
    short = [f"pretrain.pcl.{edit}" for edit in ("epochs=2", "warmup_epochs=0")]
    workspace = kill_test.Workspace(tmp_path / "run", processes=2, edits=short)
    kill = workspace.kill("pcl", "forward", workspace.measured("pcl"), random.Random("forward0"), whole=False)
    assert not kill.wrong, kill
    assert kill.resumed > 0, f"expected a moment after the first checkpoint, change the seed: {kill}"
