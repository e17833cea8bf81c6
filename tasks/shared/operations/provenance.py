"""Where a run comes from: git commit, hashes of data and code, and parameters, as MLflow's tags and params."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from deepclust.config import as_dict
from deepclust.errors import DataError
from tasks.shared.operations.params import read
from tasks.shared.operations.params.schema import Params
from tasks.shared.outputs import layout
from tasks.shared.outputs import read as reading

ROOT = Path(__file__).resolve().parents[3]
# What the pipeline itself writes into git, which does not make the code "dirty".
_WRITTEN = (":!dvc.lock", f":!{layout.METRICS}", f":!{layout.PLOTS}", f":!{layout.PARAMS}")
_SEEDED = ("prepare", "cluster", "adapt")


def stage_name(stage: str, encoder: str | None) -> str:
    """The stage as DVC names it: `embed@swav`, `report`."""
    return f"{stage}@{encoder}" if encoder else stage


def git() -> dict[str, str]:
    """The commit and whether tracked code differs from it; empty outside a git repository."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN)
    return {"mlflow.source.git.commit": commit, "git.commit": commit, "git.dirty": "true" if changed else "false"}


def _git(*arguments: str) -> str | None:
    # Without optional locks, `git status` can not make a commit of the user's fail.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code_deps(stage: str, method: str) -> list[str]:
    """The code that a stage of dvc.yaml depends on: files and folders relative to the repository's root.

    Args:
        stage: Name without its encoder.
        method: Of the encoder; replaces `${item}`.
    """
    code = [dep for dep in deps(stage) if dep.startswith(("tasks/", "deepclust/"))]
    return sorted(dep.replace("${item}", method) for dep in code)


def deps(stage: str) -> list[str]:
    """What a stage depends on in dvc.yaml, with `${key}` for its encoder and `${item}` for the encoder's method."""
    return list(_stated(stage)["deps"])


def param_keys(stage: str) -> list[str]:
    """The keys of params.yaml that a stage depends on in dvc.yaml, with `${key}` for its encoder."""
    return list(_stated(stage)["params"])


def _stated(stage: str) -> dict[str, Any]:
    found = _stages(ROOT / "dvc.yaml")[stage]
    return dict(found.get("do", found))


@cache
def _stages(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = read(file)["stages"]
    return found


def code_hash(*paths: str) -> str:
    """SHA-256 over the names and contents of files and of all files in folders, relative to the repository's root."""
    found = hashlib.sha256()
    for file in (file for path in paths for file in source_files(path)):
        content = (ROOT / file).read_bytes()
        found.update(f"{file} {len(content)}\n".encode() + content)
    return found.hexdigest()


def source_files(path: str) -> list[str]:
    """A file itself, or the files of a folder in order, without Python's caches; relative to the repository's root."""
    place = ROOT / path
    if place.is_file():
        return [path]
    files = (file for file in place.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def data_hash() -> str | None:
    """Content hash of the prepared data, or None before anything is prepared, or where its description is damaged."""
    try:
        value: str = reading.record(layout.META, {"content_hash": str})["content_hash"]
    except (DataError, OSError):
        return None
    return value


def data_tags() -> dict[str, str]:
    """The tag that ties a run to its data; empty before anything is prepared."""
    value = data_hash()
    return {"data.hash": value} if value else {}


def file_hash(*paths: Path) -> str:
    """SHA-256 over the names and bytes of files; a missing file differs from an empty one."""
    total = hashlib.sha256()
    for path in paths:
        present = path.is_file()
        total.update(f"{path.name}:{present}:".encode())
        if present:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def encoder_hash(encoder: str) -> str:
    """Hash of a trained encoder, by which a registered model is traced to the run that trained it."""
    folder = layout.out("pretrain", encoder)
    return file_hash(folder / "encoder.safetensors", folder / "encoder.json")


def pipeline_key() -> str:
    """Hash of commit and params.yaml: runs for which it is the same have one parent."""
    text = layout.PARAMS.read_bytes() if layout.PARAMS.exists() else b""
    commit = git().get("git.commit", "")
    return hashlib.sha256(commit.encode() + b"\0" + text).hexdigest()[:16]


def stage_params(stage: str, encoder: str | None, params: Params) -> dict[str, str]:
    """A stage's parameters, flat. Names do not begin with the section's, so that MLflow compares methods by them."""
    if stage == "pretrain":
        assert encoder
        own = {"method": params.method(encoder), "image_size": params.image_size(encoder)}
        own |= as_dict(params.options(encoder))
        return flatten({"seed": params.seed} | params.pretrain.network() | own)
    everything = params.resolved()
    if stage == "sizes":
        return flatten({"encoders": everything["encoders"]})
    if stage == "report":
        return flatten({"seed": params.seed, "encoders": everything["encoders"]} | everything["report"])
    seed = {"seed": params.seed} if stage in _SEEDED else {}
    return flatten(seed | everything["data" if stage == "prepare" else stage])


def all_params(params: Params) -> dict[str, str]:
    """Every parameter with its dotted path in params.yaml; of the encoders, those that run."""
    return flatten(params.resolved(params.encoders))


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """Nested mappings and lists of mappings to dotted names; other lists as JSON."""
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        items = [(f"{name}.{index}", item) for index, item in enumerate(value)]
    else:
        return {name: json.dumps(list(value)) if isinstance(value, (list, tuple)) else str(value)}
    return {path: text for key, item in items for path, text in flatten(item, key).items()}
