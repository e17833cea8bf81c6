"""Two runs of the pipeline leave the same dvc.lock, which is made of the hashes of all outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.shared.outputs import layout
from tests.tasks import small_run


def _outputs() -> dict[str, bytes]:
    tops = (layout.ARTIFACTS, layout.METRICS, layout.PLOTS)
    return {str(path): path.read_bytes() for top in tops for path in top.rglob("*") if path.is_file()}


def test_a_second_run_of_every_stage_writes_the_same_bytes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _outputs()
    small_run.run("prepare", monkeypatch)
    for stage in ("pretrain", "embed", "cluster", "linear", "adapt"):
        small_run.run(stage, monkeypatch, "swav")
    small_run.run("report", monkeypatch)
    after = _outputs()
    assert sorted(after) == sorted(before)
    assert [name for name in after if after[name] != before[name]] == []
