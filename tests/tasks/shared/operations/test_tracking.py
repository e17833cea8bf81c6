"""Runs in MLflow: grouping, statuses, races and an unreachable server."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepclust.errors import PreemptedError, TrackingError
from tasks.shared.operations import params, tracking
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


def start(root: Path, code: str, **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DEEPCLUST"))}
    kept |= {"PYTHONPATH": str(ROOT), **environment}
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
    parent = tracking.open_pipeline()
    monkeypatch.setenv(tracking.PARENT, parent)
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


def test_numbers_that_are_none_are_left_out_and_an_epoch_is_one_request(here: Any) -> None:
    with tracking.stage_run("pretrain", "swav", params.load()) as run:
        calls: list[Any] = []
        log_batch = run._client.log_batch
        run._client.log_batch = lambda *args, **kwargs: (calls.append(kwargs), log_batch(*args, **kwargs))
        run.log_metrics({"loss": 2.0, "knn": None, "nan": math.nan, "inf": math.inf, "rate": 0.5}, step=3)
    history = here.get_metric_history(run.run_id, "loss")
    assert [(item.step, item.value) for item in history] == [(3, 2.0)]
    found = here.get_run(run.run_id).data
    assert {name for name in found.metrics if not name.startswith("system/")} == {"loss", "rate"}
    assert len([call for call in calls if any(item.key == "loss" for item in call.get("metrics", ()))]) == 1
    assert found.params["optimiser.rate"] == str(params.load().options("swav").optimiser.rate)  # type: ignore[attr-defined]
    assert found.params["crops.0.count"] == "2"


def test_a_store_that_is_lost_is_a_warning(here: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    with tracking.stage_run("embed", "pixels", params.load()) as run:
        run._client.log_batch = refuse
        run.log_metrics({"a": 1.0})
        run.log_metrics({"b": 1.0})
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == ["warning: tracking stopped working, the stage goes on (connection refused)"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    tracking.close_pipeline("0123", "FINISHED")
    error = capsys.readouterr().err
    assert error.startswith("warning: run 0123 stays open in MLflow (expected a working MLflow store at http://127")
    assert error.count("\n") == 1
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9, got: connection refused; ") as refused:
        tracking.open_pipeline()
    assert time.monotonic() - began < 20
    assert "secret" not in f"{error}{refused.value}"


def test_switched_off_nothing_is_imported_or_written(tmp_path: Path) -> None:
    code = TRACK + "run.log_metrics({'a': 1.0}); run.pipeline.log_params({'b': 2}); run.log_artifact('none')\n"
    code += "import sys; assert 'mlflow' not in sys.modules; assert tracking.open_pipeline() == ''"
    shutil.copy(ROOT / "params.yaml", tmp_path)
    assert start(tmp_path, code, DEEPCLUST_TRACKING="off").communicate(timeout=60)[0] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
