#!/usr/bin/env bash
# prefect-kubernetes 0.8.0, kubernetes-validate 1.37.0: a work pool takes no job manifest that Kubernetes' schema takes, and the other way round.
#
# A pool's base job template may hold a whole Job. The worker compares it with what it needs and asks for `parallelism` and `completions`
# in the pod (`spec.template.spec`), where Kubernetes knows neither: they belong to the Job (`spec`).
# Expected: a minimal Job that is valid by the strict schema of batch/v1 is taken.
# Seen: it is refused for the two missing paths; with them it is taken, and then no longer valid. A cluster drops unknown fields with a
# warning, so the pool works; a check of the same manifest in continuous integration, or an API server with strict validation, refuses it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" \
  'prefect==3.8.8' 'prefect-kubernetes==0.8.0' 'kubernetes-validate==1.37.0' 'fastapi<0.151'
PREFECT_HOME="$folder/home" DO_NOT_TRACK=1 "$folder/venv/bin/python" - <<'PYTHON'
import copy

import kubernetes_validate
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration as Configuration


def valid(job: dict) -> str:
    """Empty, or what the strict schema says against it."""
    try:
        kubernetes_validate.validate(job, "1.37", strict=True)
    except kubernetes_validate.ValidationError as error:
        return error.message
    return ""


def taken(job: dict) -> str:
    """Empty, or what the worker's configuration says against it."""
    try:
        Configuration(job_manifest=copy.deepcopy(job))
    except ValueError as error:
        return str(error)
    return ""


pod = {"restartPolicy": "Never", "containers": [{"name": "prefect-job", "image": "registry.example.org/image:1"}]}
job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": {"template": {"spec": pod}}}
print("valid and refused:", " ".join(taken(job).split()))
assert not valid(job)
assert "/spec/template/spec/parallelism" in taken(job) and "/spec/template/spec/completions" in taken(job)
pod |= {"parallelism": 1, "completions": 1}
print("taken and invalid:", valid(job))
assert not taken(job)
assert "completions" in valid(job) or "parallelism" in valid(job)
PYTHON
