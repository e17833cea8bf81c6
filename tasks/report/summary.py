"""What a flow says at its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tasks.report import comparison as comparisons
from tasks.report import verdict
from tasks.report.comparison import Row
from tasks.report.comparison import aligned as aligned
from tasks.shared.operations import store
from tasks.shared.operations.processes.dvc_runner import Outcome
from tasks.shared.outputs import layout

Rows = Sequence[Row]


@dataclass
class Report:
    """What came of the stages.

    Attributes:
        outcomes: Of the stages that are up to date now.
        failed: Message of each that failed.
        held_up: Those that did not run because a stage before them failed.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    held_up: list[str] = field(default_factory=list)


def comparison(path: Path = layout.COMPARISON) -> Rows:
    """Rows of the comparison, with costs where they are known; none if there is no file."""
    return comparisons.with_costs(comparisons.table(path)) if path.exists() else []


def markdown(compared: Rows) -> str:
    """The comparison and its verdict in Markdown."""
    return "\n\n".join([comparisons.markdown(compared), *map(comparisons.literal, verdict.best(compared))])


def text(stages: Sequence[str], report: Report, compared: Rows) -> str:
    """The whole summary: each stage, each failure, the comparison, and where to look further."""
    rows = [["stage", "", "seconds"]]
    for stage in stages:
        outcome = report.outcomes.get(stage)
        what = outcome.what if outcome else "FAILED" if stage in report.failed else "not run"
        rows.append([stage, what, f"{outcome.seconds:.1f}" if outcome and outcome.what != "unchanged" else ""])
    parts = [aligned(rows, words=2), *report.failed.values()]
    if report.held_up:
        parts.append("not run, because a stage upstream failed: " + ", ".join(report.held_up))
    if compared:
        parts += [comparisons.comparison_text(compared), *verdict.best(compared)]
        parts += [f"report: {layout.REPORT.resolve()}"]
    if store.enabled():
        parts.append(f"runs and models: {mlflow_ui()}")
    return "\n\n".join(parts)


def mlflow_ui(page: str = "") -> str:
    """The command that opens MLflow's UI, or the address of the server that keeps the runs.

    Args:
        page: Path of the page to open, as `tracking.page` tells it.
    """
    uri = store.uri()
    if uri.startswith("http"):
        return uri.rstrip("/") + page
    program = Path(sys.executable).with_name("mlflow")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    command = f"{program} ui --backend-store-uri {uri} --host 127.0.0.1 --port 5000"
    return f"{command}   then open http://127.0.0.1:5000{page}"
