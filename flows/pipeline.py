"""The whole pipeline: each stage of DVC's graph as a Prefect task that waits for the stages upstream of it.

python -m flows.pipeline --stages embed --encoders swav --override pretrain.swav.epochs=5
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from threading import Semaphore
from typing import Any, get_args

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run, task_run
from prefect.states import Cancelled, Completed, Failed

from flows import isolated as isolation
from flows import pages, schema
from flows.remote import Remote
from flows.schema import EncoderName, Machines, Override, RunOn, Stage
from flows.servers import server, watchdog
from flows.stage import RETRIES, RETRY_SECONDS
from tasks.report import summary
from tasks.shared.operations import params, tracking
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.params import overrides
from tasks.shared.operations.params.schema import Params
from tasks.shared.operations.processes import dvc_runner
from tasks.shared.operations.processes.dvc_runner import DeepclustError, Outcome, PreemptedStage, StageError, Workspace
from tasks.shared.operations.text import safe_lines

# The workspace that `main` has locked since before it started the server. A flow that a worker runs locks it itself.
_held: ContextVar[Workspace] = ContextVar("_held")


def _preempted(_: Any, run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.data, PreemptedStage) and run.run_count <= RETRIES


# One retry more than `_preempted` grants: for a task without any left, Prefect logs an empty traceback.
@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES + 1,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=_preempted,
)
def run_stage(
    stage: str, runner: Workspace | Remote, slots: Semaphore, *, unchanged: bool, force: bool, env: dict[str, str]
) -> State[Outcome]:
    """One stage of the graph. DVC alone decides whether there is anything to do, so Prefect caches nothing.

    A preempted stage is tried again and goes on from its saved state; a failed one is not. A forced stage begins anew
    at its first attempt only. `slots` limits how many stages run at once.
    """
    logger = get_run_logger()
    if force and task_run.run_count <= 1:
        env = env | {"DEEPCLUST_RESUME": "never"}
    if unchanged:
        return Completed(
            name="Unchanged", message="nothing it depends on has changed", data=Outcome(stage, "unchanged", 0.0, {})
        )
    try:
        with slots:
            outcome = runner.run_stage(stage, on_line=logger.info, force=force, env=env)
    except StageError as error:
        logger.log(logging.WARNING if isinstance(error, PreemptedStage) else logging.ERROR, "%s", error)
        return Failed(message=str(error).partition("\n")[0], data=error)
    name = None if outcome.what == "run" else outcome.what.capitalize()
    return Completed(name=name, message=f"{outcome.what} in {outcome.seconds:.1f} s", data=outcome)


@flow(name="pretrain-and-eval", flow_run_name=pages.run_name, persist_result=False, validate_parameters=True)
def pretrain_and_eval(
    stages: Sequence[Stage] = (),
    encoders: Sequence[EncoderName] = (),
    overrides: Sequence[Override] = (),
    force: bool = False,
    isolated: bool = False,
    machines: Machines = 1,
    run_on: RunOn = "here",
) -> State[Any]:
    """Pretrain, embed, cluster, evaluate, adapt and compare: every stage that is not up to date.

    Args:
        stages: What to bring up to date, with everything upstream of it; all stages if none is chosen.
        encoders: Only the stages of these encoders; all encoders if none is named. The stage report needs all.
        overrides: Edits of params.yaml that stay there, such as pretrain.swav.epochs=5.
        force: Run these stages even if nothing has changed.
        isolated: Run in a copy of the workspace, beside other runs, and leave the workspace as it is.
        machines: Machines over which a stage is spread that can use several.
        run_on: Where a stage runs: here, in this run's own process; else as a run of its own in that pool.
    """
    logger = get_run_logger()
    server.watch_for_worker()
    try:
        values = _check(stages, encoders, overrides)
        with (
            watchdog.cancellable(),
            isolation.worktree(str(flow_run.name), values) if isolated else nullcontext(),
            nullcontext(held) if (held := _held.get(None)) else Workspace() as workspace,
        ):
            return _run(workspace, stages, encoders, overrides, force, run_on, machines)
    except watchdog.CancelledRun as error:
        return Cancelled(message=str(error))
    except DeepclustError as error:
        message = safe_lines(str(error))
        logger.error("error: %s", message)
        return Failed(message=message)


def _check(groups: Sequence[str], encoders: Sequence[str], edits: Sequence[str]) -> Params:
    """The parameters of the run; refuse what can not run, before anything is written."""
    values = overrides.preview(edits) if edits else params.load()
    dvc_runner.check(values, groups, encoders)
    return values


def _run(
    workspace: Workspace,
    groups: Sequence[str],
    encoders: Sequence[str],
    edits: Sequence[str],
    force: bool,
    run_on: RunOn,
    machines: int,
) -> State[Any]:
    logger = get_run_logger()
    isolated = isolation.current()
    changes = safe_lines(overrides.apply(edits)) if edits else ""
    if edits:
        logger.info("params.yaml:\n%s", changes or "says so already")
    with watchdog.stages_run():
        stages = workspace.select(groups, encoders)
        unchanged = set() if force else workspace.unchanged()
        logger.info("%d stages, %d of them unchanged", len(stages), len(unchanged.intersection(stages)))
        if machines > 1 and run_on not in ("here", "process"):
            raise StageError(f"expected several machines to run stages as processes, got run_on={run_on}; leave it out")
        where = "process" if machines > 1 else run_on
        runner = workspace if where == "here" else Remote(where, folder=isolated, machines=machines)
        tags = {**pages.tracked(), "isolated": isolated, "overrides": " ".join(edits)}
        parent = "" if unchanged.issuperset(stages) else tracking.open_pipeline(str(flow_run.name), tags)
        status = "KILLED"
        try:
            env = {tracking.PARENT: parent} if parent else {}
            report = _run_stages(runner, workspace.graph, stages, unchanged, force, env)
            status = "FAILED" if report.failed else "FINISHED"
        finally:
            with watchdog.uninterrupted():
                runner.stop()
                if parent:
                    tracking.close_pipeline(parent, status)
        table = summary.comparison() if "report" in report.outcomes else []
        text = safe_lines(summary.text(stages, report, table))  # of an address, it shows the password
        logger.log(logging.ERROR if report.failed else logging.INFO, "\n%s", text)
    steps = isolation.next_steps(isolated) if isolated else ""
    pages.publish(parent, changes, table, steps)
    if steps:
        logger.info("%s", steps)
    place = f" in {isolation.FOLDER / isolated}" if isolated else ""
    if report.failed:
        return Failed(message=f"failed{place}: " + ", ".join(report.failed))
    return Completed(message=f"{len(stages)} stages up to date{place}")


def _run_stages(
    runner: Workspace | Remote,
    graph: dict[str, tuple[str, ...]],
    stages: Sequence[str],
    unchanged: set[str],
    force: bool,
    env: dict[str, str],
) -> summary.Report:
    """Run the stages, upstream first, `slots` at once; a failed one stops only those that depend on it.

    Prefect gives each task a thread, in which it waits for the stages upstream. The limit is not the number of threads:
    one that waits would hold up a stage that could run.
    """
    slots = Semaphore(runner.slots)
    futures: dict[str, PrefectFuture[Any]] = {}
    for stage in stages:
        futures[stage] = run_stage.with_options(name=stage, task_run_name=stage).submit(
            stage,
            runner,
            slots,
            unchanged=stage in unchanged,
            force=force,
            env=env,
            wait_for=[futures[upstream] for upstream in graph[stage]],
            return_state=False,
        )
    wait(list(futures.values()))
    report = summary.Report()
    for stage, future in futures.items():
        if future.state.is_completed():
            report.outcomes[stage] = future.result()
        elif future.state.is_failed() or future.state.is_crashed():
            report.failed[stage] = str(future.result(raise_on_failure=False))
        else:
            report.held_up.append(stage)
    return report


@contextmanager
def _hold() -> Iterator[Workspace]:
    """Lock the workspace for the flow that the body calls."""
    with Workspace() as workspace:
        token = _held.set(workspace)
        try:
            yield workspace
        finally:
            _held.reset(token)


def main() -> None:
    """Run the flow here, on an embedded server if none is configured."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=pretrain_and_eval.description)
    parser.add_argument(
        "--stages", nargs="+", default=(), metavar="STAGE", help="with everything upstream; default: all"
    )
    parser.add_argument("--encoders", nargs="+", default=(), metavar="ENCODER", help="only their stages; default: all")
    parser.add_argument(
        "--override", dest="overrides", nargs="+", default=(), metavar="KEY=VALUE", help="edits of params.yaml, kept"
    )
    parser.add_argument("--force", action="store_true", help="run unchanged stages too")
    parser.add_argument("--isolated", action="store_true", help="in a copy of the workspace, beside other runs")
    parser.add_argument("--machines", default=1, metavar="N", help="machines of a stage that can use several")
    parser.add_argument("--run-on", default="here", metavar="WHERE", help=", ".join(get_args(RunOn)))
    parameters = vars(parser.parse_args())
    with errors_as_one_line():
        try:
            with nullcontext() if parameters["isolated"] else _hold() as workspace:
                # Refuse what can not run before the server is started, which takes a while.
                _check(parameters["stages"], parameters["encoders"], parameters["overrides"])
                schema.check(pretrain_and_eval.fn, parameters)
                with server.configured(hold=workspace.descriptors if workspace else ()):
                    state = pretrain_and_eval(**parameters, return_state=True)
        except KeyboardInterrupt:
            sys.exit(130)
        except TerminationSignal:
            sys.exit(143)
    sys.exit(0 if state.is_completed() else 1)


if __name__ == "__main__":
    main()
