"""Runs in MLflow: grouping, statuses, races and an unreachable server."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from deepclust.errors import PreemptedError, TrackingError
from tasks import tracking as command
from tasks.shared.operations import outbox, params, provenance, tracking
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.outputs import layout
from tests.paths import ROOT

TRACK = (
    "from tasks.shared.operations import params, tracking\n"
    "with tracking.stage_run('embed', 'swav', params.load()) as run: "
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a store that two processes opened at the same time."""
    root = tmp_path_factory.mktemp("tracked")
    shutil.copy(ROOT / "params.yaml", root)
    (root / "artifacts" / "prepare").mkdir(parents=True)
    (root / "artifacts" / "prepare" / "meta.json").write_text('{"content_hash": "data-1"}')
    for words in ("init -q", "add params.yaml", "commit -qm x"):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words.split()]
        subprocess.run(command, cwd=root, check=True)
    started = [start(root, TRACK + f"run.log_metrics({{'n': {number}}})") for number in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert outputs == ["", ""], "nothing is said of migrations or monitors"
    return root


def start(root: Path, code: str, uri: str = "", **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DEEPCLUST"))}
    kept |= {"PYTHONPATH": str(ROOT), **({"MLFLOW_TRACKING_URI": uri} if uri else {}), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=root, env=kept, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Inside the workspace, with a client of its store."""
    monkeypatch.chdir(workspace)
    for name in ("MLFLOW_TRACKING_URI", tracking.PARENT, tracking.store.SWITCH):
        monkeypatch.delenv(name, raising=False)
    return tracking.connect()[0]


def runs(client: Any, name: str) -> list[Any]:
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    return list(client.search_runs([experiment], f"attributes.run_name = '{name}'"))


def test_processes_on_a_fresh_store_share_one_parent_and_say_where_they_come_from(here: Any) -> None:
    found = [run for run in runs(here, "embed@swav") if "n" in run.data.metrics]
    assert sorted(run.data.metrics["n"] for run in found) == [0, 1]
    parents = {run.data.tags["mlflow.parentRunId"] for run in found}
    assert len(parents) == 1
    parent = here.get_run(parents.pop())
    assert parent.info.status == "FINISHED"
    assert parent.data.params["pretrain.swav.epochs"] == str(params.load().options("swav").epochs)  # type: ignore[attr-defined]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    expected = {"git.commit": commit, "git.dirty": "false", "data.hash": "data-1", "dvc.stage": "embed@swav"}
    expected |= {"mlflow.source.name": "tasks.embed", "mlflow.source.git.commit": commit}
    assert found[0].data.tags.items() >= expected.items()
    assert found[0].data.params == {"batch_size": "500"}
    assert found[0].data.metrics["system/system_memory_usage_megabytes"] > 0, "of a short stage too"


def test_a_parent_from_the_environment_is_used_and_left_open(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tracking.open_pipeline("swav · epochs=5", {"prefect.flow_run": "f1"})
    monkeypatch.setenv(tracking.PARENT, parent)
    assert here.get_run(parent).info.run_name == "swav · epochs=5"
    assert here.get_run(parent).data.tags["prefect.flow_run"] == "f1"
    page = f"/#/experiments/{here.get_run(parent).info.experiment_id}/runs/{parent}?workflowType=machine_learning"
    assert tracking.page(parent) == page
    with tracking.stage_run("linear", "swav", params.load()) as run:
        pass
    assert here.get_run(run.run_id).data.tags["mlflow.parentRunId"] == parent
    assert here.get_run(parent).info.status == "RUNNING"
    tracking.close_pipeline(parent, "FINISHED")
    assert here.get_run(parent).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (ValueError("bad images"), "FAILED"),
        (SystemExit(0), "FINISHED"),
        (PreemptedError("stopped after update 3"), "KILLED"),
    ],
)
def test_how_a_stage_ends_is_the_status_of_its_run(here: Any, raised: BaseException, status: str) -> None:
    with pytest.raises(type(raised)), tracking.stage_run("adapt", "swav", params.load()) as run:
        raise raised
    found = here.get_run(run.run_id)
    assert found.info.status == status
    assert found.data.tags.get("error") == ("bad images" if isinstance(raised, ValueError) else None)


def test_a_terminated_stage_is_killed_in_mlflow_too(here: Any, workspace: Path) -> None:
    code = TRACK.replace("'embed'", "'cluster'") + "print('ready', flush=True); import time; time.sleep(60)"
    process = start(workspace, code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert [run.info.status for run in runs(here, "cluster@swav")] == ["KILLED"]


def test_numbers_that_are_none_are_left_out_and_an_epoch_is_one_request(
    here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    log_batch = MlflowClient.log_batch
    monkeypatch.setattr(
        MlflowClient, "log_batch", lambda *args, **kwargs: (calls.append(kwargs), log_batch(*args, **kwargs))
    )
    with tracking.stage_run("pretrain", "swav", params.load()) as run:
        run.log_metrics({"loss": 2.0, "knn": None, "nan": math.nan, "inf": math.inf, "rate": 0.5}, step=3)
    history = here.get_metric_history(run.run_id, "loss")
    assert [(item.step, item.value) for item in history] == [(3, 2.0)]
    found = here.get_run(run.run_id).data
    assert {name for name in found.metrics if not name.startswith("system/")} == {"loss", "rate"}
    assert len([call for call in calls if any(item.key == "loss" for item in call.get("metrics", ()))]) == 1
    assert found.params["optimiser.rate"] == str(params.load().options("swav").optimiser.rate)  # type: ignore[attr-defined]
    assert found.params["crops.0.count"] == "2"


# MLflow's own server on the store of argument 1; it answers 500 while the file of argument 3 exists.
_SERVER = """
import os, sys
os.environ["_MLFLOW_SERVER_FILE_STORE"], os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = sys.argv[1:3]
from mlflow.server import app, handlers
from werkzeug.serving import make_server

def answer(environ, start_response):
    if os.path.exists(sys.argv[3]):
        start_response("500 Internal Server Error", [])
        return [b"out of order"]
    return app.wsgi_app(environ, start_response)

server = make_server("127.0.0.1", 0, answer, threaded=True)
handlers._get_tracking_store()
print(server.server_port, flush=True)
server.serve_forever()
"""


class Server:
    """An MLflow server in a process of its own that can be told to hang or to fail, and a client of its database."""

    def __init__(self, root: Path) -> None:
        store = f"sqlite:///{root / 'mlflow.db'}"
        self._broken = root / "broken"
        words = [sys.executable, "-c", _SERVER, store, (root / "artifacts").as_uri(), str(self._broken)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(words, **pipes)
        assert self.process.stdout is not None
        self.address = f"http://127.0.0.1:{self.process.stdout.readline().strip()}"
        self.client = MlflowClient(store)

    def stop(self, how: str) -> None:
        """Accept connections and never answer, or answer 500."""
        if how == "hangs":
            self.process.send_signal(signal.SIGSTOP)
        else:
            self._broken.touch()

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self._broken.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, root)
    found = Server(root)
    yield found
    found.process.kill()
    found.process.communicate()


@pytest.fixture
def server(here: Any, one_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The store of the runs, with short patience on our side."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_server.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(outbox, "PATIENCE_SECONDS", 4.0)
    yield one_server
    one_server.go_on()


def sync(capsys: Any) -> tuple[list[str], object]:
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tasks.tracking", "sync"])
        with pytest.raises(SystemExit) as end:
            command.main()
    return capsys.readouterr().out.splitlines(), end.value.code


@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_a_server_that_stops_answering_costs_no_time_and_nothing_that_is_logged(
    server: Server, capsys: Any, tmp_path: Path, how: str
) -> None:
    took, logged = [], []

    def log(number: int) -> None:
        began = time.time()
        run.log_metrics({"loss": 1 / (number + 1)}, step=number)
        logged.append((number, 1 / (number + 1), began, time.time()))
        took.append(logged[-1][3] - began)

    with tracking.stage_run("embed", how, params.load()) as run:
        for number in range(100):
            if number == 10:
                server.stop(how)
            log(number)
        (tmp_path / "report.html").write_text("as it was logged")
        run.log_artifact(tmp_path / "report.html")
        (tmp_path / "report.html").unlink()
        run.set_tags({"state": "known"})
        ended = time.time()
    assert time.time() - ended < 2 * outbox.PATIENCE_SECONDS
    assert sum(took) < 5
    kept = outbox.FOLDER / f"{run.run_id}.jsonl"
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("warning: tracking: ")
    assert f" entries of embed@{how} are kept in {kept} (" in error
    assert "; `python -m tasks.tracking sync` delivers them" in error
    assert len(error.splitlines()) <= 2
    lines = kept.read_text()
    server.go_on()
    told, status = sync(capsys)
    assert status == 0
    assert len(told) == 1
    assert told[0].startswith(f"embed@{how}, run {run.run_id}: ")
    assert told[0].endswith(" entries delivered")
    assert sync(capsys) == (["nothing is left to deliver"], 0)
    for again in (False, True):
        history = server.client.get_metric_history(run.run_id, "loss")
        assert [(item.step, item.value) for item in history] == [(step, value) for step, value, *_ in logged]
        for item, (*_, began, done) in zip(history, logged, strict=True):
            assert int(began * 1000) <= item.timestamp <= int(done * 1000)
        found = server.client.get_run(run.run_id)
        assert found.info.status == "FINISHED"
        assert abs(found.info.end_time / 1000 - ended) < 1
        assert found.data.tags["state"] == "known"
        report = Path(found.info.artifact_uri.removeprefix("file://")) / "report.html"
        assert report.read_text() == "as it was logged"
        if not again:  # as if the last sync had been killed before it removed the file
            kept.write_text("".join(line for line in lines.splitlines(keepends=True) if '"artifact"' not in line))
            assert sync(capsys)[1] == 0


def test_a_server_that_comes_back_gets_all_in_mid_run_and_a_deleted_run_is_named(server: Server, capsys: Any) -> None:
    with tracking.stage_run("embed", "swav", params.load()) as run:
        server.stop("fails")
        run.log_metrics({"loss": 1.0})
        deadline = time.monotonic() + 30
        while "stopped working" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.go_on()
    assert capsys.readouterr().err.startswith("tracking works again, ")
    assert server.client.get_run(run.run_id).data.metrics["loss"] == 1
    assert not list(outbox.FOLDER.glob("*"))
    server.client.delete_run(run.run_id)
    kept = outbox.FOLDER / f"{run.run_id}.jsonl"
    head = {"run_id": run.run_id, "title": "embed@swav", "store": "http://elsewhere"}
    kept.write_text(json.dumps(head) + "\n" + json.dumps([run.run_id, "tags", [["a", "b"]]]) + "\n")
    told, status = sync(capsys)
    assert status == 1
    assert told == [
        f"embed@swav, run {run.run_id} is not in {server.address}; it was tracked in http://elsewhere: "
        f"set MLFLOW_TRACKING_URI, or remove {kept}"
    ]
    kept.unlink()


def test_a_run_whose_server_hangs_obeys_sigterm_at_once(server: Server, workspace: Path, capsys: Any) -> None:
    code = """
import time
from tasks.shared.operations import params, tracking
try:
    with tracking.stage_run('cluster', 'swav', params.load()) as run:
        print(run.run_id, flush=True)
        while True:
            run.log_metrics({'a': 1.0})
            time.sleep(.01)
finally:
    print("ended", time.monotonic(), flush=True)  # the interpreter still unloads torch, for seconds on a busy machine
"""
    process = start(workspace, code, uri=server.address)
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    server.stop("hangs")
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 128 + signal.SIGTERM
    assert [line.partition(" ")[0] for line in said] == ["warning:", "ended"], said
    assert float(said[1].split()[1]) - began < 2
    server.go_on()
    assert sync(capsys)[1] == 0
    assert server.client.get_run(run_id).info.status == "KILLED"


def test_a_pipeline_whose_server_is_lost_ends_with_a_warning(
    here: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    began = time.monotonic()
    tracking.close_pipeline("0123", "FINISHED")
    error = capsys.readouterr().err
    assert error.startswith("warning: tracking: 1 entries of the pipeline's run are kept in state/tracking/0123.jsonl")
    assert error.count("\n") == 1
    (outbox.FOLDER / "0123.jsonl").unlink()
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9, got: connection refused; ") as refused:
        tracking.open_pipeline("any", {})
    assert time.monotonic() - began < 20
    assert "secret" not in f"{error}{refused.value}"


@pytest.mark.parametrize("what", ["a folder", "a link to itself", "junk", "locked", "read-only"])
def test_a_file_that_is_no_store_is_named_in_seconds(
    what: str, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", tracking.store.SWITCH):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "mlflow.db"
    if what == "a folder":
        file.mkdir()
    elif what == "a link to itself":
        file.symlink_to(file)
    elif what == "junk":
        file.write_bytes(b"no database " * 1000)
    else:
        shutil.copy(empty_store, file)
    other = sqlite3.connect(file) if what == "locked" else None
    if other:
        other.execute("BEGIN EXCLUSIVE")
    if what == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write any file")
        file.chmod(0o444)
    reason = {
        "a folder": "unable to open database file",
        "a link to itself": "unable to open database file",
        "junk": "file is not a database",
    }
    reason |= {"locked": "database is locked", "read-only": "attempt to write a readonly database"}
    began = time.monotonic()
    with pytest.raises(SystemExit, match="2"), errors_as_one_line():
        tracking.connect()
    assert time.monotonic() - began < 10
    expected = f"error: expected a working MLflow store at sqlite:///{file}, got: {reason[what]}; start or mend it"
    said = capsys.readouterr().err
    assert said.startswith(expected)
    assert said.count("\n") == 1
    if other:
        other.close()


def test_a_database_without_its_driver_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg://ann:s3cret@localhost/none")
    with pytest.raises(
        TrackingError, match=r"postgresql\+psycopg://\*\*\*@localhost/none, got: No module named 'psycopg'"
    ):
        tracking.connect()


def test_switched_off_nothing_is_imported_or_written(tmp_path: Path) -> None:
    code = TRACK + "run.log_metrics({'a': 1.0}); run.pipeline.log_params({'b': 2}); run.log_artifact('none')\n"
    code += "import sys; assert 'mlflow' not in sys.modules; assert tracking.open_pipeline('any', {}) == ''"
    shutil.copy(ROOT / "params.yaml", tmp_path)
    assert start(tmp_path, code, DEEPCLUST_TRACKING="off").communicate(timeout=60)[0] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("stage", layout.STAGES)
def test_every_stage_has_parameters_to_log(stage: str) -> None:
    values = params.load(ROOT / "params.yaml")
    logged = provenance.stage_params(stage, None if stage in layout.ONCE else "swav", values)
    assert logged
    assert all(isinstance(value, str) for value in logged.values())
    if stage == "pretrain":
        assert logged["image_size"] == "auto"
