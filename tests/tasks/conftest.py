"""Workspaces in which every stage ran, made once a session, and what tests do in copies of them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tasks.shared.operations.params import overrides
from tests.tasks import small_run

ENCODERS = ("swav", "random", "pixels", "deepcluster_v2", "pcl")


def _whole(root: Path, encoders: Sequence[str], *, labelled: bool) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        small_run.build(root, labelled=labelled)
        overrides.apply(
            [f"encoders=[{', '.join(encoders)}]", "adapt.settings=[reset, continual]", "data.max_skipped=0.02"]
        )
        if labelled:
            (root / "images/kind0/a<b>&.jpg").write_bytes(b"no image")
            few = shutil.ignore_patterns("a*", "0[0-7]*")  # 16 of 96
            shutil.copytree(root / "images", root / "domains/<b>a & b", ignore=few)
        small_run.run("prepare", patch)
        for stage in ("pretrain", "embed", "cluster", "linear", "adapt"):
            for encoder in encoders:
                small_run.run(stage, patch, encoder)
        small_run.run("report", patch)
    return root


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With labels, a file that can not be read, and a domain whose name looks like markup."""
    return _whole(tmp_path_factory.mktemp("labelled"), ENCODERS, labelled=True)


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without any label."""
    return _whole(tmp_path_factory.mktemp("unlabelled"), ("pixels", "swav"), labelled=False)


@pytest.fixture
def here(labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inside a copy of the labelled workspace."""
    monkeypatch.chdir(shutil.copytree(labelled, tmp_path / "copy"))
    return tmp_path / "copy"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without runs, to be copied: making one takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
    return path
