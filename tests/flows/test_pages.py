"""What Prefect's pages show of a run: its form, its name, its artifacts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from flows import pages
from flows.pipeline import pretrain_and_eval
from tasks.report import summary
from tasks.shared.operations import tracking


def _artifacts(client: SyncPrefectClient, state: State[Any]) -> dict[str | None, Any]:
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    return {artifact.key: artifact.data for artifact in client.read_artifacts(artifact_filter=wanted)}


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({}, "all stages"),
        ({"stages": ["pretrain", "embed"], "encoders": ["swav"]}, "pretrain, embed · swav"),
        (
            {"overrides": ["pretrain.swav.epochs=5", "data.folder=s3://me:secret@a/b\x1b"], "force": True},
            "all stages · swav.epochs=5, data.folder=s3://***@a/b\\x1b · forced",
        ),
        ({"isolated": True, "machines": 2, "run_on": "docker"}, "all stages · isolated · 2 machines · docker"),
    ],
)
def test_a_run_is_named_by_what_differs_and_shows_no_secret(parameters: dict[str, Any], name: str) -> None:
    assert pages._name(**parameters) == name
    assert len(pages._name(overrides=["data.folder=" + "x" * 9000])) == 80


def test_a_run_names_and_describes_itself_in_both_uis(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, dict[str, str]]] = []
    monkeypatch.setattr(tracking, "open_pipeline", lambda *what: opened.append(what) or "0123")
    monkeypatch.setattr(tracking, "page", lambda run: f"/#/experiments/1/runs/{run}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1/")
    url = str(PREFECT_API_URL.value())
    monkeypatch.setenv("PREFECT_API_URL", url)
    state = pretrain_and_eval(overrides=["embed.batch_size=9"], return_state=True)
    assert state.is_completed()
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
        found = _artifacts(client, state)
    assert run.name == "all stages · embed.batch_size=9"
    page = f"{url.removesuffix('/api')}/runs/flow-run/{run.id}"
    tags = {"prefect.flow_run": str(run.id), "prefect.url": page}
    tags |= {"mlflow.note.content": f"[Flow run in Prefect]({page})", "isolated": "", "overrides": "embed.batch_size=9"}
    assert opened == [(run.name, tags)]
    assert found["comparison"] == summary.markdown(summary.comparison())
    for part in (
        f"**Workspace**: `{root}`",
        f"**Report**: `{root}/artifacts/report/report.html`",
        "**MLflow**: [run 0123](http://127.0.0.1:1/#/experiments/1/runs/0123)",
        "    -  batch_size: 500\n    +  batch_size: 9\n",
    ):
        assert part in found["results"]


def test_only_a_generated_name_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, name in (
        ("dandelion-hornet", "embed"),
        ("tau39-kaneko-conflux", "embed"),
        ("For the paper", "For the paper"),
    ):
        monkeypatch.setattr(pages, "flow_run", SimpleNamespace(name=given, parameters={"stages": ["embed"]}))
        assert pages.run_name() == name


def test_the_server_refuses_parameters_that_do_not_fit_the_form(prefect: None) -> None:
    def refused(**parameters: Any) -> str:
        with pytest.raises(PrefectHTTPStatusError) as error:
            client.create_flow_run_from_deployment(deployment, parameters=parameters)
        return error.value.response.text

    with get_client(sync_client=True) as client:
        schema = pretrain_and_eval.parameters.model_dump_for_openapi()
        deployment = client.create_deployment(
            client.create_flow(pretrain_and_eval),
            name="form",
            parameter_openapi_schema=schema,
            enforce_parameter_schema=True,
        )
        assert "'embd' is not one of" in refused(stages=["embd"])
        assert "'x' is not of type 'array'" in refused(overrides="x")
        assert "'x' does not match" in refused(overrides=["x"])
        assert "'../x' does not match" in refused(encoders=["../x"])
        assert "greater than the maximum" in refused(machines=65)
        assert client.create_flow_run_from_deployment(deployment, parameters={"stages": ["embed"]}).id
