"""A stage's deps in dvc.yaml hold all code of ours that can change its outputs: what each stage loads is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.shared.operations import provenance
from tests.paths import ROOT
from tests.tasks import small_run

# What decides where a stage runs, what it reports and how it ends, never what it writes.
CANNOT_CHANGE_OUTPUTS = (
    "tasks/__init__.py",
    "tasks/shared/operations",
    "deepclust/config.py",
    "deepclust/errors.py",
    "deepclust/temporary.py",
    "deepclust/methods/__init__.py",  # only finds a method's own file
)
# Probe and watchdog follow a training run with these; they can stop it.
OBSERVES_WITH = {"pretrain": ("deepclust/evaluation",)}
# Libraries are loaded once, and each stage runs in a fork of that process.
_RUN = """
import json, os, runpy, sys
import timm, mlflow, sklearn.cluster, sklearn.linear_model, torch, torchvision, scipy.optimize, safetensors.torch
from tasks.shared.operations.params.schema import Params
Params.check = lambda self: None  # it reads the file of every method and adapter, and can only refuse
for words in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        print("LOADED " + json.dumps([words, sorted(file for file in files if file)]), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{words} failed")
"""
RUNS = [
    ("sizes", None),
    ("prepare", None),
    *(("pretrain", encoder) for encoder in ("pixels", "random", "swav", "pcl")),
    *((stage, "pcl") for stage in ("embed", "cluster", "linear", "adapt")),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deps")
    small_run.build(folder, count=60)
    edits = ["encoders=[pixels, random, swav, pcl]", "pretrain.pcl.epochs=2", "cluster.seeds=1", "adapt.images=10"]
    edits += ["adapt.classifiers=[linear, clusters, fine_tuned]", "adapt.fine_tune.epochs=1", "adapt.domains=images"]
    small_run.overrides.apply(edits, folder / "params.yaml")
    return folder


@pytest.fixture(scope="module")
def loaded(root: Path) -> dict[tuple[str, str | None], set[str]]:
    """The files of ours, without empty ones, that each stage loads while it runs."""
    words = [[f"tasks.{stage}", *([encoder] if encoder else [])] for stage, encoder in RUNS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DEEPCLUST_TRACKING": "off"}
    command = [sys.executable, "-c", _RUN, json.dumps(words)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("LOADED ") for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    return {run: _ours(json.loads(line)[1]) for run, line in zip(RUNS, lines, strict=True)}


def _ours(files: list[str]) -> set[str]:
    paths = [Path(file) for file in files]
    ours = [path for path in paths if path.is_relative_to(ROOT / "tasks") or path.is_relative_to(ROOT / "deepclust")]
    return {path.relative_to(ROOT).as_posix() for path in ours if path.read_text(encoding="utf-8").strip()}


def _covered(file: str, places: tuple[str, ...]) -> bool:
    return any(file == place or file.startswith(f"{place}/") for place in places)


@pytest.mark.parametrize(("stage", "encoder"), RUNS)
def test_a_stage_loads_nothing_of_ours_beside_its_deps_and_what_cannot_change_outputs(
    stage: str, encoder: str | None, loaded: dict[tuple[str, str | None], set[str]]
) -> None:
    allowed = (*provenance.code_deps(stage, encoder or ""), *CANNOT_CHANGE_OUTPUTS, *OBSERVES_WITH.get(stage, ()))
    assert "tasks/shared/outputs/stage.py" in loaded[stage, encoder]
    beside = {file for file in loaded[stage, encoder] if not _covered(file, allowed)}
    assert not beside, f"{stage} loads {sorted(beside)}: add them to its deps in dvc.yaml"


def test_every_dep_exists_and_nothing_that_cannot_change_outputs_is_one_nor_another_method() -> None:
    for stage in ("sizes", "prepare", "pretrain", "embed", "cluster", "linear", "adapt", "report"):
        for method in ("pixels", "random", "pretrained", "swav", "deepcluster_v2", "moco", "pcl", "simsiam"):
            for dep in provenance.code_deps(stage, method):
                assert (ROOT / dep).exists(), f"{stage}: {dep}"
                assert not any(_covered(quiet, (dep,)) for quiet in CANNOT_CHANGE_OUTPUTS), f"{stage}: {dep}"
                assert dep != "deepclust/methods/pcl.py" or (stage, method) == ("pretrain", "pcl"), "others stay"
