"""Runs in MLflow: one for each stage, nested under one for the pipeline. All stages reach MLflow through this module.

    with tracking.stage_run("embed", "swav", params) as run:
        run.log_metrics({"rankme": 41.7})

`DEEPCLUST_TRACKING=off` switches it off. `MLFLOW_TRACKING_URI` names a server; without it, runs go to `mlflow.db` and
`mlartifacts/` of the workspace. MLflow is imported late, because that alone takes seconds.

Runs are made by MLflow's client and not by `mlflow.start_run(parent_run_id=…, log_system_metrics=True)`, which ends a
run that was interrupted, preempted or left by `SystemExit(0)` as FAILED, logs no system metrics of a stage shorter than
its sampling interval, raises where the server is lost before the run ends, and goes on with the run of `MLFLOW_RUN_ID`.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from deepclust.errors import PreemptedError, TrackingError
from tasks.shared.operations import provenance, store
from tasks.shared.operations.lock import locked
from tasks.shared.operations.outbox import FOLDER, Entry, Outbox
from tasks.shared.operations.params import load as load_params
from tasks.shared.operations.params.schema import Params
from tasks.shared.operations.processes.signals import TERMINATED, sigterm_exits
from tasks.shared.operations.text import masked, warn
from tasks.shared.outputs import environment

PARENT = "DEEPCLUST_PARENT_RUN"
EXPERIMENT = "deepclust"
OUTPUT_TAG = "deepclust.output"  # hash of the encoder that a run trained
_KEY_TAG = "deepclust.pipeline"
_BATCH = {"metrics": 1000, "params": 100, "tags": 100}  # the most of each that MLflow takes in one request
_SAMPLE_SECONDS = 10


class Run:
    """A run in MLflow.

    Nothing waits for the server, which was reached when the run began: what is logged goes through an outbox
    (outbox.py). If the server fails later, that is said once on stderr and the stage goes on: its results are files,
    and hours of training are not lost to a log.

    Attributes:
        run_id: MLflow's id.
        pipeline: The parent run that groups a pipeline run's stages.
    """

    def __init__(self, outbox: Outbox | None, run_id: str, pipeline: Run | None = None) -> None:
        self._outbox = outbox
        self.run_id = run_id
        self.pipeline = pipeline or self

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, once per name."""
        self._log("params", _params(values))

    def log_metrics(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """Log numbers in one request; None, NaN and infinities are left out."""
        now = int(time.time() * 1000)
        numbers = {name: float(value) for name, value in values.items() if value is not None}
        finite = [(name, value, now, step or 0) for name, value in numbers.items() if math.isfinite(value)]
        self._log("metrics", finite)

    def log_artifact(self, path: Path | str) -> None:
        """Copy a file, as it is now, to the run."""
        if self._outbox:
            self._outbox.add_file(self.run_id, Path(path))

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags, replacing those of the same name."""
        self._log("tags", [(name, masked(str(value))[:5000]) for name, value in values.items()])

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._log("end", [(status, int(time.time() * 1000))])

    def _log(self, kind: str, values: Sequence[tuple[Any, ...]]) -> None:
        if self._outbox:
            for entry in _entries(self.run_id, kind, values):
                self._outbox.add(entry)


def _params(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, masked(str(value))[:6000]) for name, value in values.items()]


def _entries(run_id: str, kind: str, values: Sequence[tuple[Any, ...]]) -> list[Entry]:
    """As many as MLflow's limits need."""
    most = _BATCH.get(kind, 1)
    return [Entry(run_id, kind, values[start : start + most]) for start in range(0, len(values), most)]


def send(client: Any, entry: Entry) -> None:
    """Deliver an entry; the same entry again changes nothing, since MLflow keeps one of equal metrics."""
    if entry.kind in _BATCH:
        from mlflow.entities import Metric, Param, RunTag

        make = {"metrics": Metric, "params": Param, "tags": RunTag}[entry.kind]
        client.log_batch(entry.run_id, **{entry.kind: [make(*value) for value in entry.values]}, synchronous=True)
    elif entry.kind == "artifact":
        client.log_artifact(entry.run_id, str(FOLDER / entry.values[0]))
    else:
        run = client.get_run(entry.run_id).info
        if run.lifecycle_stage != "active":
            raise TrackingError("deleted")
        for status, end_time in entry.values if entry.kind == "end" else ():
            if (run.end_time or 0) <= end_time:  # else the run, a pipeline's, was gone on with and has ended since
                client.set_terminated(entry.run_id, status, end_time)


class NullRun(Run):
    """A run that keeps nothing."""

    def __init__(self) -> None:
        super().__init__(None, "")


def open_pipeline(name: str, tags: Mapping[str, str]) -> str:
    """Begin a pipeline run and return its id, for `DEEPCLUST_PARENT_RUN` of its stages; empty if tracking is off.

    Args:
        name: What the run is called.
        tags: What tells it from others, and where it comes from; empty ones are left out.

    Raises:
        ConfigError: If params.yaml is not valid.
        TrackingError: If the store can not be reached.
    """
    if not store.enabled():
        return ""
    params = load_params()
    given = {key: masked(value)[:5000] for key, value in tags.items() if value}
    return _begun(lambda: _create_parent(*_connect(), params, name, given))


def page(run_id: str) -> str:
    """Path of a run's page in MLflow's UI; empty if the store can not be reached."""
    try:
        experiment = _begun(lambda: _client().get_run(run_id)).info.experiment_id
    except TrackingError:
        return ""
    return f"/#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"  # else the pages for agents


def close_pipeline(run_id: str, status: str) -> None:
    """End a pipeline run as FINISHED, FAILED or KILLED. If the store is lost, that is a warning and no error."""
    if not store.enabled() or not run_id:
        return
    client = cache(_client)  # made by the thread that sends
    try:
        outbox = Outbox(run_id, "the pipeline's run", lambda entry: send(client(), entry))
    except OSError as error:
        warn(f"run {run_id} stays open in MLflow ({store.line(error)})")
        return
    Run(outbox, run_id).finish(status)
    outbox.close()


@contextmanager
def stage_run(stage: str, encoder: str | None, params: Params) -> Iterator[Run]:
    """Track the body as one run: FINISHED, FAILED on an exception or a non-zero exit, KILLED on a signal.

    Raises:
        OSError: If nothing can be written under state/.
        TrackingError: If the store can not be reached or the parent run is not there.
    """
    if not store.enabled():
        yield NullRun()
        return
    with sigterm_exits():
        client, run_id, parent, owned = _begun(lambda: _begin(stage, encoder, params))
        outbox = Outbox(run_id, provenance.stage_name(stage, encoder), partial(send, client))
        run = Run(outbox, run_id, Run(outbox, parent))
        run.log_params(provenance.stage_params(stage, encoder, params))
        status = "FAILED"
        try:
            with _system_metrics(run):
                yield run
            status = "FINISHED"
        except (KeyboardInterrupt, PreemptedError):
            status = "KILLED"
            raise
        except SystemExit as stop:
            status = "KILLED" if stop.code == TERMINATED else "FAILED" if stop.code else "FINISHED"
            raise
        except BaseException as error:
            run.set_tags({"error": store.line(error)})
            raise
        finally:
            if stage == "prepare":  # the data have a hash only now
                run.set_tags(provenance.data_tags())
            if stage == "pretrain" and encoder and status == "FINISHED":
                run.set_tags({OUTPUT_TAG: provenance.encoder_hash(encoder)})
            run.finish(status)
            if owned:
                run.pipeline.finish(status)
            outbox.close(hurry=status == "KILLED")


def _begun(begin: Callable[[], store.Result]) -> store.Result:
    """The result of the calls that decide whether a run can begin; obeys signals while they wait."""
    _import()

    def first() -> store.Result:
        with store.errors(), store.impatient():
            return begin()

    return store.interruptible(first)


def _begin(stage: str, encoder: str | None, params: Params) -> tuple[Any, str, str, bool]:
    """A client, the stage's run, its parent, and whether that is ours to end (nobody else does under `dvc repro`)."""
    client, experiment = _connect()
    name = provenance.stage_name(stage, encoder)
    parent = os.environ.get(PARENT)
    owned = not parent
    parent = parent or _derived_parent(client, experiment, params)
    if not owned:
        client.get_run(parent)  # a wrong id would hide the run from the UI's tree
    tags = {"mlflow.parentRunId": parent, "dvc.stage": name, "stage": stage, **_source(f"tasks.{stage}")}
    tags |= {"encoder": encoder} if encoder else {}
    tags |= provenance.data_tags() if stage != "prepare" else {}
    return client, client.create_run(experiment, run_name=name, tags=tags).info.run_id, parent, owned


def _derived_parent(client: Any, experiment: str, params: Params) -> str:
    """The parent of all stages that run with this commit and these parameters; the first of them creates it."""
    key = provenance.pipeline_key()
    with locked("tracking"):
        found = client.search_runs([experiment], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return str(found[0].info.run_id)
        name = f"pipeline {provenance.git().get('git.commit', '')[:8]}".strip()
        return _create_parent(client, experiment, params, name, {_KEY_TAG: key})


def _create_parent(client: Any, experiment: str, params: Params, name: str, tags: Mapping[str, str]) -> str:
    own = {**_source("deepclust pipeline"), **provenance.data_tags(), **tags}
    run_id = str(client.create_run(experiment, run_name=name, tags=own).info.run_id)
    for entry in _entries(run_id, "params", _params(provenance.all_params(params))):
        send(client, entry)
    return run_id


def _source(name: str) -> dict[str, str]:
    return {"mlflow.source.name": name, "mlflow.source.type": "LOCAL", **provenance.git()}


def connect() -> tuple[Any, str]:
    """A client of the store, which exists and answers, and the id of the experiment.

    Raises:
        TrackingError: In one line, within seconds.
    """
    return _begun(_connect)


def _import() -> None:
    environment.prepare()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # from another thread, in between
    if store.is_file():
        with store.errors(), locked("tracking-store"):  # another process may be making its tables
            store.check_file()
    import mlflow  # takes seconds, so what can not work is said before

    # MLflow installs log handlers when it is imported; its notes on migrations would fill a stage's output.
    for noisy in ("alembic", mlflow.__name__):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.uri())


def _connect() -> tuple[Any, str]:
    import mlflow

    with ExitStack() as stack:
        if store.is_file():  # several processes that migrate a fresh file at once break it
            stack.enter_context(locked("tracking-store"))
        mlflow.set_tracking_uri(store.uri())
        client = _client()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            place = Path("mlartifacts").resolve().as_uri() if store.is_file() else None
            kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI takes it for GenAI traces otherwise
            return client, str(client.create_experiment(name, artifact_location=place, tags=kind))
        return client, str(experiment.experiment_id)


def log_model(
    experiment: str,
    run_id: str | None,
    folder: Path,
    *,
    requirements: list[str],
    signature: Any,
    example: Any,
    metadata: Mapping[str, Any],
) -> str:
    """Store a model that is defined by source code, and return its address.

    Args:
        experiment: The experiment that the model belongs to.
        run_id: The run that the model belongs to, if any.
        folder: Has `model.py`, the definition, `files/`, which it reads, and the package `deepclust/`.
        requirements: Pinned packages; MLflow would infer them by running the model in a new process, for a minute.
        signature: What the model takes and gives, as MLflow describes it.
        example: Images (n, height, width, channels) uint8.
        metadata: What else to keep.

    Raises:
        TrackingError: If the store refuses it.
    """
    with store.errors(), store.http(seconds=60, retries=2):  # a server may store a large file elsewhere first
        import mlflow
        from mlflow.models import Model

        mlflow.set_experiment(experiment_id=experiment)
        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=mlflow.pyfunc,
            run_id=run_id,
            python_model=str(folder / "model.py"),
            artifacts={"files": str(folder / "files")},
            code_paths=[str(folder / "deepclust")],
            pip_requirements=requirements,
            signature=signature,
            input_example=example,
            metadata=dict(metadata),
        )
        return str(info.model_uri)


def create_version(client: Any, name: str, address: str, run_id: str | None, tags: Mapping[str, str]) -> None:
    """Make a stored model the next version of a registered one, which is created if need be."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    client.create_model_version(name, address, run_id, dict(tags), model_id=address.rpartition("/")[2])


@contextmanager
def _system_metrics(run: Run) -> Iterator[None]:
    """Processor, memory, disk, network and GPU of the machine, sampled while the body runs and once at its end.

    MLflow's monitor measures. Its own thread would wait for the server, at the end of a stage too, and end for good at
    the first failure; and it publishes nothing of a stage that is shorter than its interval.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run.run_id, sampling_interval=_SAMPLE_SECONDS, tracking_uri=store.uri())
    ended = threading.Event()

    def sample() -> None:
        for step in itertools.count():
            ended.wait(monitor.sampling_interval)
            monitor.collect_metrics()
            run.log_metrics({f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}, step)
            for part in monitor.monitors:
                part.clear_metrics()
            if ended.is_set():
                return

    thread = threading.Thread(target=sample, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
