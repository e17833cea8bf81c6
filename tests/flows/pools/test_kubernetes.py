"""What is sent to a cluster is valid there, runs without rights, and holds no secret.

No cluster is asked: Kubernetes' own schemas are, and the code of Prefect's worker, whose request is recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import http.server
import json
import re
import threading
import uuid
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_asyncio.client import ApiClient, Configuration
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL, temporary_settings
from prefect.utilities.schema_tools.validation import ValidationError, validate
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

from flows import pools
from flows.pools import kubernetes
from tasks.shared.operations.processes.dvc_runner import StageError
from tests.paths import ROOT

VERSIONS = ("1.31", "1.37")  # the oldest and the newest that docs/operations.md names
SETTINGS: dict[str, Any] = {"image": "registry.example.org/deepclust:0.1.0", "workspace": "/workspace"}
SECRET = "deepclust:of-the-server-and-of-nobody-else"
MANIFESTS = ROOT / "flows/pools/manifests"


def _manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(MANIFESTS.glob("*.yaml")):
        if file.name != "kustomization.yaml":
            for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
                yield f"{file.name}: {document['kind']} {document['metadata']['name']}", document


def _job(pool: str, asked: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """What Prefect's worker, which has a credential itself, makes of our template for one run."""
    template = kubernetes.templates(kubernetes.Settings(**{**SETTINGS, **settings}))[pool]
    stored = json.loads(json.dumps(template))  # as the server gives it back
    theirs = {PREFECT_API_URL: "http://127.0.0.1:4200/api", PREFECT_API_AUTH_STRING: SECRET, PREFECT_API_KEY: SECRET}
    with temporary_settings(theirs):
        configuration = asyncio.run(
            KubernetesWorkerJobConfiguration.from_template_and_values(stored, client=object(), values=asked or {})
        )
        configuration.prepare_for_flow_run(FlowRun(id=uuid.UUID(int=7), flow_id=uuid.UUID(int=8), name="embed@swav Ü"))
    return _posted(configuration)


def _posted(configuration: KubernetesWorkerJobConfiguration) -> dict[str, Any]:
    """What the worker sends to the API server of a cluster."""
    requests = []

    class Cluster(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, json.loads(body)))
            self.send_response(201)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    async def create(url: str) -> None:
        async with ApiClient(Configuration(host=url)) as client:
            await KubernetesWorker(work_pool_name="any")._create_job(configuration, client)

    with http.server.HTTPServer(("127.0.0.1", 0), Cluster) as cluster:
        answering = threading.Thread(target=cluster.handle_request)
        answering.start()
        asyncio.run(create(f"http://127.0.0.1:{cluster.server_port}"))
        answering.join()
    [(path, job)] = requests
    assert path == f"/apis/batch/v1/namespaces/{configuration.namespace}/jobs"
    return job


def _check(resource: dict[str, Any]) -> None:
    for version in VERSIONS:
        assert kubernetes_validate.validate(resource, version, strict=True) == version


def _pod(resource: dict[str, Any]) -> dict[str, Any]:
    return resource["spec"]["template"]["spec"]


def _containers(resource: dict[str, Any]) -> list[dict[str, Any]]:
    return [*_pod(resource)["containers"], *_pod(resource).get("initContainers", [])]


def _runs_without_rights(resource: dict[str, Any]) -> bool:
    """What the namespace enforces: "Restricted" of https://kubernetes.io/docs/concepts/security/pod-security-standards."""
    pod = _pod(resource)
    return (
        pod["securityContext"]["runAsNonRoot"] is True
        and pod["securityContext"]["runAsUser"] > 0
        and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        and all(
            container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            for container in _containers(resource)
        )
        and all({"persistentVolumeClaim", "emptyDir"} & volume.keys() for volume in pod.get("volumes", []))
    )


@pytest.mark.parametrize(("name", "manifest"), [pytest.param(*found, id=found[0]) for found in _manifests()])
def test_a_manifest_is_valid_in_the_oldest_and_the_newest_kubernetes(name: str, manifest: dict[str, Any]) -> None:
    _check(manifest)
    misspelt = {**manifest, "spek": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="spek"):
        _check(misspelt)
    if manifest["kind"] in ("Deployment", "Job"):
        assert _runs_without_rights(manifest), name
        assert _pod(manifest)["enableServiceLinks"] is False
        has_token = _pod(manifest).get("automountServiceAccountToken", True)
        assert has_token == (manifest["metadata"]["name"] == "worker")


def test_the_manifests_fit_together_and_the_pools_defaults() -> None:
    found = {(manifest["kind"], manifest["metadata"]["name"]): manifest for _, manifest in _manifests()}
    settings = kubernetes.Settings(**SETTINGS)
    assert ("Namespace", settings.namespace) in found
    assert found["PersistentVolumeClaim", settings.claim]["spec"]["accessModes"] == ["ReadWriteMany"]
    service = found["Service", "prefect"]
    assert settings.api_url == f"http://prefect:{service['spec']['ports'][0]['port']}/api"
    named = {
        entry["name"] for entry in found["Deployment", "prefect"]["spec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert service["spec"]["ports"][0]["targetPort"] in named
    texts = "".join(file.read_text(encoding="utf-8") for file in MANIFESTS.glob("*.yaml"))
    assert set(re.findall(r"secretKeyRef: \{name: ([\w-]+), key: (\w+)\}", texts)) == {
        (settings.secret, kubernetes.SECRET_KEY)
    }
    commands = [" ".join(container["command"]) for container in _containers(found["Deployment", "worker"])]
    for pool in (pools.KUBERNETES, pools.KUBERNETES_GPU):
        assert any(re.search(rf"worker start .*--pool {pool}$", command) for command in commands)
    listed = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert {*listed, "kustomization.yaml", "pretrain.yaml"} == {file.name for file in MANIFESTS.glob("*")}
    assert not [kind for kind, _ in found if kind == "Secret"], "it is made by a command, and never committed"


def test_the_worker_has_the_rights_that_it_uses_and_no_others() -> None:
    [rules] = [manifest["rules"] for _, manifest in _manifests() if manifest["kind"] == "Role"]
    rights = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert rights == {
        *(("jobs", verb) for verb in ("create", "get", "list", "watch", "delete")),
        *(("pods", verb) for verb in ("get", "list", "watch")),
        ("pods/log", "get"),
        ("events", "create"),
    }


@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_the_job_of_a_run_is_valid_and_has_gpus_only_in_the_pool_for_what_computes(
    gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    for pool, expected in ((pools.KUBERNETES, 0), (pools.KUBERNETES_GPU, gpus)):
        job = _job(pool, gpus=gpus, node_selector={"gpu.example.org/kind": "h200"})
        pod = _pod(job)
        # The worker insists on two fields that the schema knows for Jobs only; Kubernetes drops what it does not know.
        assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
        _check(job)
        [container] = pod["containers"]
        assert container["resources"] == ({"limits": {"nvidia.com/gpu": expected}} if expected else {})
        assert ("nvidia.com/gpu" in {toleration["key"] for toleration in pod["tolerations"]}) == bool(expected)
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert values.get("NVIDIA_VISIBLE_DEVICES") == (None if expected else "void")
        assert values.get("PET_NPROC_PER_NODE") == ("4" if expected == 4 else None)
        assert values["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
        assert values["PREFECT__FLOW_RUN_ID"] == str(uuid.UUID(int=7))
        assert (container["command"], container["args"]) == (["python", "-m", "flows.container"], [])
        assert pod["nodeSelector"] == {"gpu.example.org/kind": "h200"}


def test_a_broken_job_is_found() -> None:
    job = _job(pools.KUBERNETES_GPU)
    for broken, message in (
        ({"backoffLimit": "never"}, "'never' is not of type 'integer'"),
        ({"backofLimit": 0}, "'backofLimit' was unexpected"),
    ):
        wrong = deepcopy(job)
        for field in ("parallelism", "completions"):
            del _pod(wrong)[field]
        wrong["spec"].update(broken)
        with pytest.raises(kubernetes_validate.ValidationError, match=re.escape(message)):
            _check(wrong)


def test_a_job_runs_without_rights_as_the_user_who_owns_the_workspace() -> None:
    job = _job(pools.KUBERNETES, user=2001, group=2002)
    assert _runs_without_rights(job)
    assert _pod(job)["automountServiceAccountToken"] is False
    context = _pod(job)["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (2001, 2002, 2002)


def test_the_credential_is_in_no_job_but_comes_from_a_secret() -> None:
    for pool in (pools.KUBERNETES, pools.KUBERNETES_GPU):
        job = _job(pool, secret="credential")
        assert SECRET not in json.dumps(job)
        [entry] = [entry for entry in _containers(job)[0]["env"] if entry["name"] == "PREFECT_API_AUTH_STRING"]
        assert entry["valueFrom"] == {"secretKeyRef": {"name": "credential", "key": "auth"}}


def test_who_starts_a_run_can_set_nothing_of_its_job() -> None:
    asked = {
        **{"image": "evil", "command": "sh", "env": {"PREFECT_API_URL": "http://evil/api", "X": "1"}, "env.Y": "1"},
        **{"namespace": "kube-system", "service_account_name": "admin", "name": "evil", "labels": {"x": "evil"}},
        **{"backoff_limit": 9, "finished_job_ttl": 1, "job_manifest": {}, "annotations": {"x": "evil"}},
    }
    for pool, template in kubernetes.templates(kubernetes.Settings(**SETTINGS)).items():
        assert "{{" not in json.dumps(template)
        for name, value in asked.items():
            with pytest.raises(ValidationError, match="was unexpected"):  # as the server answers, with status 422
                validate({name: value}, template["variables"], raise_on_error=True)
        assert _job(pool, asked) == _job(pool)


def test_an_evicted_pod_is_replaced_and_any_other_failure_ends_the_job() -> None:
    spec = _job(pools.KUBERNETES)["spec"]
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert spec["backoffLimit"] == 0
    pod = _pod({"spec": spec})
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert env["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "relinquish", "the worker's own is to schedule it anew"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("image", "deepclust:latest", "--image to be registry, name and tag"),
        ("image", "registry.example.org/deepclust", "--image to be registry, name and tag"),
        ("image", "registry.example.org/deepclust:", "--image to be registry, name and tag"),
        ("image", "registry.example.org/Deepclust:1 --privileged", "--image to be registry, name and tag"),
        ("namespace", "Deep_Clust", "--namespace to be at most 63 of a-z, 0-9 and -, got 'Deep_Clust'"),
        ("namespace", "n" * 64, "--namespace to be at most 63"),
        ("claim", "", "--claim to be a claim of the namespace"),
        ("claim", "a" * 254, "--claim to be a claim of the namespace"),
        ("secret", "../secret", "--secret to be a Secret of the namespace"),
        ("service_account", "me\n", "--service-account to be"),
        ("workspace", "workspace", "--workspace to be the absolute path"),
        ("workspace", "/", "--workspace to be the absolute path"),
        ("workspace", "/data/../etc", "--workspace to be the absolute path"),
        ("workspace", "/data:ro", "without ':'"),
        ("workspace", "/{{ image }}", "without ':', '{' or '}'"),
        ("api_url", "http://127.0.0.1:4200/api", "--api-url to be an address that pods reach"),
        ("api_url", "http://me:hunter2@prefect:4200/api", r"got 'http://\*\*\*@prefect"),
        ("api_url", "http://[prefect/api", "--api-url to be an address that pods reach"),
        ("api_url", "http://{{x}}/api", "--api-url to be an address that pods reach"),
        ("api_url", "prefect:4200", "--api-url to be an address that pods reach"),
        ("gpus", -1, "--gpus-per-stage to be a whole number from 0"),
        ("user", 0, "--run-as-user to be a whole number from 1"),
        ("node_selector", {"a b": "c"}, "--node-selector to be a label of nodes, KEY=VALUE, got 'a b=c'"),
        ("pull_policy", "never", "--pull-policy to be IfNotPresent, Always or Never"),
        ("shared_memory", "8g", "--pod-shared-memory to be a size such as 512Mi or 8Gi"),
    ],
)
def test_a_bad_setting_is_one_line_that_says_what_is_expected(option: str, value: Any, message: str) -> None:
    with pytest.raises(StageError, match=message) as error:
        kubernetes.Settings(**{**SETTINGS, option: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "image",
    [
        "localhost:5000/deepclust:1",
        "ghcr.io/me/deep-clust:0.1.0",
        f"a.b/c@sha256:{'0' * 64}",
        "a.b/c:1@sha256:" + "0" * 64,
    ],
)
def test_an_image_with_registry_and_version_is_taken(image: str) -> None:
    kubernetes.Settings(image=image, workspace="/w")


def test_an_address_with_a_password_is_kept_out_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@mlflow.example.org")
    with pytest.raises(StageError, match=r"MLFLOW_TRACKING_URI: .* got 'https://\*\*\*@mlflow"):
        kubernetes.templates(kubernetes.Settings(**SETTINGS))


def test_an_image_that_is_on_the_nodes_needs_no_registry() -> None:
    kubernetes.Settings(image="deepclust:1", workspace="/w", pull_policy="Never")


def test_a_command_line_states_the_settings_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    parser.add_argument("--image")
    kubernetes.options(parser)
    line = ["--image", SETTINGS["image"]]
    assert kubernetes.Settings.of(parser.parse_args(line)) == kubernetes.Settings(
        image=SETTINGS["image"], workspace=str(tmp_path)
    )
    more = ["--gpus-per-stage", "2", "--node-selector", "a=b", "--node-selector", "c.d/e=f", "--keep", "60"]
    settings = kubernetes.Settings.of(parser.parse_args([*line, *more]))
    assert (settings.gpus, settings.keep_seconds) == (2, 60)
    assert settings.node_selector == {"a": "b", "c.d/e": "f"}
