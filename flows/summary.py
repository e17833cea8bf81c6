"""What a flow says at its end."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tasks import layout, store
from tasks.run import Outcome

Table = list[list[str]]


@dataclass
class Report:
    """What came of the stages.

    Attributes:
        outcomes: Of the stages that are up to date now.
        failed: Message of each that failed.
        held_up: Those that did not run because one upstream of them failed.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    held_up: list[str] = field(default_factory=list)


def comparison(path: Path = layout.COMPARISON) -> Table:
    """The comparison table, its header first; empty if there is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [[_short(cell) for cell in row] for row in csv.reader(file)]
    except FileNotFoundError:
        return []


def markdown(table: Table) -> str:
    """A table in Markdown."""
    header, *rows = table
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def aligned(table: Table) -> str:
    """A table in columns, words to the left and numbers to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    left = [not any(_is_number(row[column]) for row in table[1:]) for column in range(len(widths))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in table
    )


def text(stages: Sequence[str], report: Report, table: Table) -> str:
    """The whole summary: each stage, each failure, the comparison, and where to look further."""
    rows = [["stage", "", "seconds"]]
    for stage in stages:
        outcome = report.outcomes.get(stage)
        what = outcome.what if outcome else "FAILED" if stage in report.failed else "not run"
        rows.append([stage, what, f"{outcome.seconds:.1f}" if outcome and outcome.what != "unchanged" else ""])
    parts = [aligned(rows), *report.failed.values()]
    if report.held_up:
        parts.append("not run, because a stage upstream failed: " + ", ".join(report.held_up))
    if table:
        parts += [aligned(table), f"report: {layout.REPORT.resolve()}"]
    if store.enabled():
        parts.append(f"runs and models: {mlflow_ui()}")
    return "\n\n".join(parts)


def mlflow_ui() -> str:
    """The command that opens MLflow's UI, or the address of the server that keeps the runs."""
    uri = store.uri()
    if uri.startswith("http"):
        return uri
    program = Path(sys.executable).with_name("mlflow")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return f"{program} ui --backend-store-uri {uri} --host 127.0.0.1 --port 5000   then open http://127.0.0.1:5000"


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _short(cell: str) -> str:
    """Three decimals of a fraction."""
    return f"{float(cell):.3f}" if _is_number(cell) and "." in cell else cell
