"""The Kubernetes work pools: each run is a Job of one pod, with the workspace on a volume that all pods mount.

There are two, because a pool's template is fixed. In `deepclust-kubernetes` a pod has no GPU: the pipeline, which only
waits for its stages, and the stages that read files. In `deepclust-kubernetes-gpu` it has: the stages that compute.
With one pool, the pipeline would hold the GPU that its stages wait for.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from flows.pools import KUBERNETES, KUBERNETES_GPU, Pool, environment
from tasks.shared.operations.processes.dvc_runner import StageError
from tasks.shared.operations.text import masked

TYPE = "kubernetes"
SECRET_KEY = "auth"  # of the Secret; its value is the string `user:password` that the server asks for

_GRACE_SECONDS = 60  # between SIGTERM and SIGKILL: a stage saves its state
_LOST_NODE_SECONDS = 60  # before the pods of a node that no longer answers are given up; Kubernetes' default is 300

_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_NAME = rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*"
_SELECTOR = r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?=([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?"
_REGISTRY = r"([A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+(:\d+)?|[A-Za-z0-9-]+:\d+|localhost)/"
_DIGEST = "@sha256:[0-9a-f]{64}"
_TAGGED = rf"[a-z0-9]+([._/-]+[a-z0-9]+)*(:\w[\w.-]{{0,127}}({_DIGEST})?|{_DIGEST})"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the Jobs of both pools are made with.

    Attributes:
        image: As the nodes pull it, with registry and tag (or digest); without a registry only if they never pull.
        workspace: Absolute path of the clone: where the volume is mounted, in this pod as in all others.
        namespace: Where the Jobs run. Claim, Secret and service account are in it.
        claim: The PersistentVolumeClaim of the volume, which has the access mode ReadWriteMany.
        secret: The Secret that holds the credential of Prefect's server, under the key `auth`.
        api_url: Prefect's API as pods reach it.
        gpus: GPUs of a stage that computes.
        node_selector: Labels of the nodes that may run a Job.
        service_account: Needs no rights; pods are pulled with the secrets that it names.
        pull_policy: IfNotPresent, Always or Never.
        user: Number of the user who owns the workspace.
        group: Number of that user's group.
        shared_memory: Size of /dev/shm, in Mi or Gi. What is in it counts as memory of the pod.
        deadline_seconds: How long a run may take, over all its pods.
        keep_seconds: How long a Job stays after its end, with its log.

    Raises:
        StageError: If Kubernetes would refuse a value, or no pod could work with it.
    """

    image: str
    workspace: str
    namespace: str = "deepclust"
    claim: str = "workspace"
    secret: str = "prefect-auth"
    api_url: str = "http://prefect:4200/api"
    gpus: int = 1
    node_selector: dict[str, str] = field(default_factory=dict)
    service_account: str = "default"
    pull_policy: str = "IfNotPresent"
    user: int = 1000
    group: int = 1000
    shared_memory: str = "8Gi"
    deadline_seconds: int = 14 * 86_400
    keep_seconds: int = 3600

    def __post_init__(self) -> None:
        image = f"({_REGISTRY})?{_TAGGED}" if self.pull_policy == "Never" else _REGISTRY + _TAGGED
        _match("image", self.image, image, "registry, name and tag, such as registry.example.org/deepclust:0.1.0")
        _match("namespace", self.namespace, _LABEL, "at most 63 of a-z, 0-9 and -")
        _match("claim", self.claim, _NAME, "a claim of the namespace, of a-z, 0-9, - and .")
        _match("secret", self.secret, _NAME, "a Secret of the namespace, of a-z, 0-9, - and .")
        _match("service-account", self.service_account, _NAME, "a service account, of a-z, 0-9, - and .")
        _match("pull-policy", self.pull_policy, "IfNotPresent|Always|Never", "IfNotPresent, Always or Never")
        _match("pod-shared-memory", self.shared_memory, "[1-9][0-9]*(Mi|Gi)", "a size such as 512Mi or 8Gi")
        for label in (f"{key}={value}" for key, value in self.node_selector.items()):
            _match("node-selector", label, _SELECTOR, "a label of nodes, KEY=VALUE")
        if not re.fullmatch(r"(/[^/:{}\n]+)+", self.workspace) or {".", ".."} & set(Path(self.workspace).parts):
            raise _unfit(
                "workspace", "the absolute path at which pods mount the volume, without ':', '{' or '}'", self.workspace
            )
        _check_address(self.api_url)
        for option, number, least in (
            ("gpus-per-stage", self.gpus, 0),
            ("run-as-user", self.user, 1),  # a pod of user 0, root, is refused
            ("run-as-group", self.group, 1),
            ("deadline", self.deadline_seconds, 1),
            ("keep", self.keep_seconds, 1),
        ):
            if not least <= number < 2**31:
                raise _unfit(option, f"a whole number from {least} to 2^31 - 1", number)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """What a command line says that has `options` and --image; the workspace is the current folder."""
        return cls(
            image=arguments.image,
            workspace=str(Path.cwd()),
            namespace=arguments.namespace,
            claim=arguments.claim,
            secret=arguments.secret,
            api_url=arguments.api_url,
            gpus=arguments.gpus_per_stage,
            node_selector=dict(label.partition("=")[::2] for label in arguments.node_selector),
            service_account=arguments.service_account,
            pull_policy=arguments.pull_policy,
            user=arguments.run_as_user,
            group=arguments.run_as_group,
            shared_memory=arguments.pod_shared_memory,
            deadline_seconds=arguments.deadline,
            keep_seconds=arguments.keep,
        )


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Settings`, but --image, which other pools have too."""
    group = parser.add_argument_group("Kubernetes")
    for option, default, meaning in (
        ("--namespace", Settings.namespace, "where the Jobs run"),
        ("--claim", Settings.claim, "the PersistentVolumeClaim that holds the workspace"),
        ("--secret", Settings.secret, f"the Secret with the server's credential under the key {SECRET_KEY}"),
        ("--api-url", Settings.api_url, "Prefect's API as pods reach it"),
        ("--gpus-per-stage", Settings.gpus, "GPUs of a stage that computes"),
        ("--service-account", Settings.service_account, "the pods'; it needs no rights"),
        ("--pull-policy", Settings.pull_policy, "IfNotPresent, Always or Never"),
        ("--run-as-user", Settings.user, "number of the user who owns the workspace"),
        ("--run-as-group", Settings.group, "number of that user's group"),
        ("--pod-shared-memory", Settings.shared_memory, "size of a pod's /dev/shm"),
        ("--deadline", Settings.deadline_seconds, "seconds that a run may take"),
        ("--keep", Settings.keep_seconds, "seconds that a Job and its log stay after its end"),
    ):
        group.add_argument(option, default=default, type=type(default), help=f"{meaning} (default: %(default)s)")
    group.add_argument(
        "--node-selector", metavar="KEY=VALUE", action="append", default=[], help="a label that the nodes must have"
    )


def of(settings: Settings) -> list[Pool]:
    """The pools that `make serve ARGS=--kubernetes` makes. The cluster starts their workers."""
    deployments = {
        KUBERNETES: ("pretrain-and-eval/kubernetes", "stage/kubernetes"),
        KUBERNETES_GPU: ("stage/kubernetes-gpu",),
    }
    return [
        Pool(name=name, kind=TYPE, template=template, deployments=deployments[name])
        for name, template in templates(settings).items()
    ]


def templates(settings: Settings) -> dict[str, dict[str, Any]]:
    """The base job template of each of the two pools, by its name."""
    return {KUBERNETES: _template(settings, gpus=0), KUBERNETES_GPU: _template(settings, gpus=settings.gpus)}


def _match(option: str, value: str, pattern: str, wanted: str) -> None:
    if not re.fullmatch(pattern, value, re.ASCII):
        raise _unfit(option, wanted, value)


def _check_address(url: str) -> None:
    try:
        address = urlsplit(url)
        host, port = address.hostname or "", address.port
    except ValueError:
        host = ""
    fits = (
        re.fullmatch(r"[\w.:-]+", host, re.ASCII)
        and port != 0
        and address.scheme in ("http", "https")
        and address.path == "/api"
    )
    if not fits or host in ("localhost", "::1") or host.startswith("127.") or "@" in address.netloc:
        wanted = "an address that pods reach, without a password, such as http://prefect:4200/api"
        raise _unfit("api-url", wanted, masked(url))


def _unfit(option: str, wanted: str, got: object) -> StageError:
    return StageError(f"expected --{option} to be {wanted}, got {got!r}; correct it and run again")


def _template(settings: Settings, *, gpus: int) -> dict[str, Any]:
    """The worker adds the run's number to environment and labels, and makes the Job's name of the run's."""
    return {
        "job_configuration": {
            "namespace": settings.namespace,
            "env": _environment(settings, gpus),
            "job_manifest": {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"namespace": settings.namespace},
                "spec": {
                    # A pod that Kubernetes itself ends (its node drained, preempted, lost or out of memory or disk) is
                    # replaced as often as needed, and its stage resumes. Any other failure ends the Job: the worker
                    # sees that at once, where with a limit above 0 it would wait for more failures.
                    "backoffLimit": 0,
                    "podFailurePolicy": {
                        "rules": [
                            {
                                "action": "Ignore",
                                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                            }
                        ]
                    },
                    "activeDeadlineSeconds": settings.deadline_seconds,
                    "ttlSecondsAfterFinished": settings.keep_seconds,
                    "template": {"spec": _pod(settings, gpus)},
                },
            },
        },
        "variables": {"type": "object", "properties": {}, "additionalProperties": False},
    }


def _environment(settings: Settings, gpus: int) -> list[dict[str, Any]]:
    """The container's variables; as a list, which the worker does not unite with what a run asks for.

    The worker passes on its own settings. A value of None takes one of them out, so that no credential stands in a Job,
    which more people may read than a Secret.
    """
    values = {
        **environment.container(),
        "PREFECT_API_URL": settings.api_url,
        "PREFECT_API_AUTH_STRING": None,
        "PREFECT_API_KEY": None,
        "PREFECT_SERVER_API_AUTH_STRING": None,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": None,
        # The run goes on in the pod that replaces this one, so being told to stop does not end it.
        "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "relinquish",
    }
    if gpus > 1:
        values["PET_NPROC_PER_NODE"] = str(gpus)
    if not gpus:
        values["NVIDIA_VISIBLE_DEVICES"] = "void"  # images of CUDA ask for all GPUs of the node, past the scheduler
    return [
        *({"name": name, "value": value} for name, value in values.items()),
        {
            "name": "PREFECT_API_AUTH_STRING",
            "valueFrom": {"secretKeyRef": {"name": settings.secret, "key": SECRET_KEY}},
        },
    ]


def _pod(settings: Settings, gpus: int) -> dict[str, Any]:
    tolerations = [
        {"key": f"node.kubernetes.io/{taint}", "effect": "NoExecute", "tolerationSeconds": _LOST_NODE_SECONDS}
        for taint in ("not-ready", "unreachable")
    ]
    if gpus:
        tolerations.append({"key": "nvidia.com/gpu", "effect": "NoSchedule"})
    return {
        # The worker insists on these two. They belong to a Job and not to a pod, so that Kubernetes drops them.
        "parallelism": 1,
        "completions": 1,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # else a Service named prefect sets variables that Prefect reads as settings
        "nodeSelector": settings.node_selector,
        "tolerations": [{"operator": "Exists", **toleration} for toleration in tolerations],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": settings.user,
            "runAsGroup": settings.group,
            "fsGroup": settings.group,
            "fsGroupChangePolicy": "OnRootMismatch",  # else each pod goes through all files of the volume
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "prefect-job",
                "image": settings.image,
                "imagePullPolicy": settings.pull_policy,
                "command": ["python", "-m", "flows.container"],
                "args": [],  # without them the worker adds a command of its own
                "workingDir": settings.workspace,
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "resources": {"limits": {"nvidia.com/gpu": gpus}} if gpus else {},
                "volumeMounts": [
                    {"name": "workspace", "mountPath": settings.workspace},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": settings.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
        ],
    }
