"""What a flow costs over `dvc repro`: seconds a stage, measured on stages that do nothing."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import psutil
import pytest

from tests.paths import ROOT
from tests.services import workspaces
from tests.services.serving import Served

REPEATS = 2
STAGES = 8
# Seconds a stage that the flow may add. On a busy machine they are only printed.
LIMITS = {"local": 1.5, "docker": 6.0}
_IDLE = 25.0  # per cent of all cores, which the servers take alone
_RESULT = ROOT / "state/services/overhead.json"


def _chain() -> str:
    """dvc.yaml of stages that follow one another, under names of the pipeline's."""
    names = ["sizes", "prepare", "pretrain", "embed", "cluster", "linear", "adapt", "report"]
    text, upstream = "stages:\n", ""
    for name in names:
        once = name in ("sizes", "prepare", "report")
        out = f"artifacts/{name}" if once else f"artifacts/{name}/pixels"
        body = f"cmd: mkdir -p $(dirname {out}) && echo {name} >{out}\ndeps: [{upstream}]\nouts: [{out}]\n"
        indent = "    " if once else "      "
        text += f"  {name}:\n" if once else f"  {name}:\n    foreach: [pixels]\n    do:\n"
        text += "".join(f"{indent}{line}\n" for line in body.splitlines())
        upstream = out
    return text


@pytest.fixture
def served(docker_served: Served) -> Iterator[Served]:
    """The workspace that is served, with such a chain."""
    workspaces.reset(docker_served.root)
    (docker_served.root / "dvc.yaml").write_text(_chain(), encoding="utf-8")
    yield docker_served
    workspaces.reset(docker_served.root)


def _seconds(run: dict[str, Any]) -> float:
    """From the flow's first line to its end, without the time in which a worker starts it."""
    begin, end = (datetime.fromisoformat(run[name]) for name in ("start_time", "end_time"))
    return (end - begin).total_seconds()


def test_a_flow_adds_little_to_each_stage(served: Served) -> None:
    busy = psutil.cpu_percent(interval=3) > _IDLE
    added: dict[str, list[float]] = {name: [] for name in LIMITS}
    for _ in range(REPEATS):
        begin = time.monotonic()
        workspaces.run(served.root, "python", "-m", "dvc", "repro", "--force")
        plain = time.monotonic() - begin
        for name, seconds in added.items():
            run = served.ended(served.start(f"pretrain-and-eval/{name}", force=True))
            assert run["state"]["type"] == "COMPLETED", served.logs(run["id"])
            seconds.append((_seconds(run) - plain) / STAGES)
    lines = {}
    for name, seconds in added.items():
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        lines[name] = {"median": middle, "least": low, "most": high}
        print(f"{name}: {middle:.2f} s a stage over dvc repro ({low:.2f} to {high:.2f})")
    _RESULT.parent.mkdir(parents=True, exist_ok=True)
    _RESULT.write_text(json.dumps(lines | {"repeats": REPEATS, "busy": busy}, indent=1) + "\n", encoding="utf-8")
    if not busy:
        for name, limit in LIMITS.items():
            assert lines[name]["median"] < limit, lines
