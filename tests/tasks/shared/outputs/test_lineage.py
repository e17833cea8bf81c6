"""Artifacts name by hash what they were made from; those that do not belong together are refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from deepclust.errors import CheckpointError, DataError
from tasks.model import assign, register
from tasks.shared.operations.params import overrides
from tasks.shared.outputs import layout, lineage
from tests.tasks import small_run
from tests.tasks.conftest import ENCODERS

Patch = pytest.MonkeyPatch


def _read(*out: str) -> dict[str, dict[str, str]]:
    return json.loads((layout.out(*out) / "lineage.json").read_text())


def _assign(patch: Patch) -> None:
    patch.setattr("sys.argv", ["assign", "--encoder", "random", "images/kind1", "--out", "table.csv"])
    assign.main()


def test_an_artifact_has_the_hash_of_each_file_and_of_each_artifact_of_its_deps(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hashed(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    prepared, embedded = _read("prepare"), _read("embed", "pcl")
    names = [path.relative_to(layout.PREPARED).as_posix() for path in layout.PREPARED.rglob("*.*")]
    assert prepared == {
        "outputs": {name: hashed(layout.PREPARED / name) for name in sorted(names) if name != "lineage.json"},
        "inputs": {"artifacts/sizes": _folder_hash("sizes")},
        "reported": {"metrics/prepare.json": hashed(layout.metrics("prepare"))},
    }
    assert embedded["inputs"] == {
        "artifacts/prepare/encoders/pcl.json": hashed(layout.statistics("pcl")),
        "artifacts/pretrain/pcl": _folder_hash("pretrain", "pcl"),
    }
    stages = ("pretrain", "embed", "cluster", "linear", "adapt")
    folders = {layout.out(stage, encoder).as_posix() for stage in stages for encoder in ENCODERS}
    assert set(_read("report")["inputs"]) == {"artifacts/prepare"} | folders
    lineage.check([*lineage.inputs("report", *ENCODERS), *lineage.inputs("adapt", "swav")])
    assert capsys.readouterr() == ("", "")


def _folder_hash(*names: str) -> str:
    return hashlib.sha256(json.dumps(_read(*names)["outputs"], sort_keys=True).encode()).hexdigest()


def _retrain(patch: Patch) -> None:
    overrides.apply(["seed=1"])
    small_run.run("pretrain", patch, "random")


def _relabel(patch: Patch) -> None:
    Path("images/kind2").rename("images/kind3")
    small_run.run("prepare", patch)


def _resize(patch: Patch) -> None:
    overrides.apply(["data.resize=stretch"])
    small_run.run("prepare", patch)


@pytest.mark.parametrize(
    ("change", "since", "stages"),
    [
        (
            _retrain,
            "artifacts/pretrain/random has changed since embed@random, cluster@random ran",
            ["embed", "cluster", "linear"],
        ),
        (_relabel, "artifacts/prepare has changed since cluster@random, linear@random ran", ["cluster", "linear"]),
        (
            _resize,
            "artifacts/prepare has changed since pretrain@random, embed@random, cluster@random, linear@random ran",
            ["pretrain", "embed", "cluster", "linear"],
        ),
    ],
)
def test_artifacts_that_do_not_belong_together_are_refused_until_the_named_stages_ran_in_this_order(
    here: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Patch], None],
    since: str,
    stages: list[str],
) -> None:
    change(monkeypatch)
    command = f"dvc repro --single-item {' '.join(f'{stage}@random' for stage in stages)}"
    line = f"expected artifacts that belong together, but {since}; run `{command}`"
    before = sorted(here.rglob("*"))
    for joins in (partial(_assign, monkeypatch), partial(small_run.run, "adapt", monkeypatch, "random")):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            joins()
        assert capsys.readouterr().err == f"error: {line}\n"
    assert sorted(here.rglob("*")) == before
    with pytest.raises(CheckpointError, match=re.escape(line)):
        register.register("random")
    for stage in stages:
        small_run.run(stage, monkeypatch, "random")
    _assign(monkeypatch)
    lineage.check(lineage.inputs("adapt", "random"))


def test_what_is_absent_is_not_compared_and_what_an_earlier_version_made_is_warned_of(
    here: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    (layout.out("cluster", "random") / "lineage.json").unlink()
    shutil.rmtree(layout.out("embed", "random"))
    _assign(monkeypatch)
    warning, assigned = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: whether the artifacts of cluster@random belong together is not known")
    assert assigned == "32 images assigned, 0 skipped, 0 other files ignored"


def test_a_damaged_lineage_is_one_line(here: Path) -> None:
    outside = {"outputs": {"../../../params.yaml": "0" * 64}, "inputs": {}, "reported": {}}
    for text in ("", "[]", '{"outputs": {}, "inputs": 3, "reported": {}}', json.dumps(outside)):
        (layout.out("linear", "swav") / "lineage.json").write_text(text)
        with pytest.raises(
            DataError, match=r"linear/swav/lineage.json.*; remove it and run `dvc repro linear@swav`, after"
        ):
            lineage.check(lineage.inputs("adapt", "swav"))
