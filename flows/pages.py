"""What the pages of Prefect show of a run of the pipeline: a name that says what differs, and what came of it."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from tasks.report import summary
from tasks.shared.operations import tracking
from tasks.shared.operations.text import masked, safe
from tasks.shared.outputs import layout

_LONGEST = 80
# What Prefect and its form call a run that nobody has named: `dandelion-hornet`, `tau39-kaneko-conflux`.
_GENERATED = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+")


def run_name() -> str:
    """The name of the flow run in which this is called: `pretrain · swav · swav.epochs=5`.

    A name that a person gave to the run stays.
    """
    given = str(flow_run.name or "")
    return _name(**flow_run.parameters) if _GENERATED.fullmatch(given) or not given else given


def _name(
    *,
    stages: Sequence[str] = (),
    encoders: Sequence[str] = (),
    overrides: Sequence[str] = (),
    force: bool = False,
    isolated: bool = False,
    machines: int = 1,
    run_on: str = "here",
) -> str:
    parts = [
        ", ".join(stages) or "all stages",
        ", ".join(encoders),
        ", ".join(edit.removeprefix("pretrain.") for edit in overrides),
        "forced" if force else "",
        "isolated" if isolated else "",
        f"{machines} machines" if machines > 1 else "",
        run_on if run_on != "here" else "",
    ]
    name = safe(" · ".join(filter(None, parts)))
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def tracked() -> dict[str, str]:
    """Tags of the MLflow run of this flow run, and its description, that lead to the page in Prefect."""
    tags = {"prefect.flow_run": str(flow_run.id)}
    # Else the server is gone when the flow is.
    if "PREFECT_API_URL" in os.environ and (page := url_for("flow-run", flow_run.id)):
        tags |= {"prefect.url": page, "mlflow.note.content": f"[Flow run in Prefect]({masked(page)})"}
    return tags


def publish(run_id: str, changes: str, rows: summary.Rows, steps: str) -> None:
    """Make the run's artifacts: the comparison, and where the results are.

    Args:
        run_id: The MLflow run of the flow run; empty if there is none.
        changes: The diff of params.yaml, fit to be shown; empty if nothing was edited.
        rows: Of the comparison; none if there is no report.
        steps: What to do with an isolated run, as commands; empty for another run.
    """
    parts = [f"**Workspace**: `{Path.cwd()}`"]
    if rows:
        create_markdown_artifact(summary.markdown(rows), key="comparison", description="Encoders compared")
        parts.append(f"**Report**: `{layout.REPORT.resolve()}`")
    if run_id:
        parts.append(_mlflow(run_id))
    if changes:
        parts.append(f"**Changed in params.yaml**:\n\n{textwrap.indent(changes, '    ')}")
    if steps:
        parts.append(f"**Isolated**:\n\n{textwrap.indent(steps, '    ')}")
    create_markdown_artifact("\n\n".join(parts), key="results", description="Where the results are")


def _mlflow(run_id: str) -> str:
    """A link to the run, and the command that it needs where no server keeps it."""
    command, _, address = summary.mlflow_ui(tracking.page(run_id)).rpartition("   then open ")
    link = f"**MLflow**: [run {run_id}]({masked(address).replace('***@', '')})"
    return f"{link}, while this runs:\n\n    {masked(command)}" if command else link
