"""Who goes back to earlier parameters or to an earlier commit waits for nothing: DVC restores what has run before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks.shared.operations import params, provenance
from tasks.shared.operations.params import overrides
from tasks.shared.operations.processes.dvc_runner import Workspace
from tasks.shared.outputs import layout, lineage
from tests import pipelines
from tests.paths import ROOT

# Stands for each stage: writes what it has read and, as `pretrain`, its epochs.
_STAGE = """
import json, re, sys
from pathlib import Path
from tasks.shared.outputs import layout, lineage
stage, *names = sys.argv[1:]
encoders = [name.partition("@")[2] for name in names]
with open("state/ran", "a") as ran:
    print(stage, file=ran)
read = lineage.inputs(stage, *encoders)
lineage.check(read)
made = lineage.hashes(read)
if stage == "pretrain":
    made["epochs"] = re.search(r"\\n  swav:.*?epochs: (\\d+)", Path("params.yaml").read_text(), re.S)[1]
folder = layout.out(stage, *encoders)
files = [folder / "made.json", layout.metrics(stage, *encoders)]
files += [layout.curve(stage, *encoders)] if stage in ("pretrain", "adapt") else []
if stage == "prepare":
    files += [layout.META, *(layout.split(split) / "labels.npy" for split in layout.SPLITS)]
    files += map(layout.statistics, ["pixels", "random", "swav"])
for file in files:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made | {"image_size": 8}))
lineage.write(folder, lineage.hashes(read))
"""
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of DVC's own calls
OUTS = ("outs", "metrics", "plots")
STAGES = ["sizes", "prepare", "pretrain", "embed", "cluster", "linear", "adapt"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the real dvc.yaml over stages that take a moment."""
    pipelines.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    Path("dvc.yaml").write_text(text.replace("python -m tasks.", "python made.py "), encoding="utf-8")
    Path("made.py").write_text(_STAGE, encoding="utf-8")
    for name in ("state", "data"):
        Path(name).mkdir()
    for dep in (ROOT / path for stage in STAGES for path in provenance.code_deps(stage, "swav")):
        path = dep.relative_to(ROOT) if dep.suffix else dep.relative_to(ROOT) / "code.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    overrides.apply(["encoders=[swav]"])
    return tmp_path


def _git(*words: str) -> None:
    identity = ["-c", "user.name=name", "-c", "user.email=name@example.org"]
    subprocess.run(["git", *identity, *words], check=True, capture_output=True)


def _repro(*targets: str) -> None:
    """As `dvc repro` does."""
    with Repo() as repo:
        repo.reproduce(targets)


def _contents() -> dict[str, bytes]:
    tops = (layout.ARTIFACTS, layout.METRICS, layout.PLOTS)
    return {str(path): path.read_bytes() for top in tops for path in top.rglob("*") if path.is_file()}


def test_going_back_to_earlier_parameters_or_an_earlier_commit_restores_pretraining_and_adaptation(root: Path) -> None:
    overrides.apply(["pretrain.swav.epochs=2"])
    _repro("adapt@swav")
    assert pipelines.ran(root) == STAGES
    first = _contents()
    assert b'"epochs": "2"' in first["artifacts/pretrain/swav/made.json"]
    _git("add", "params.yaml", "dvc.lock", "metrics", "plots")
    _git("commit", "-m", "two epochs")
    overrides.apply(["pretrain.swav.epochs=4"])
    _repro("adapt@swav")
    twice = [*STAGES, "sizes", *STAGES[2:]]  # other epochs decode no images again
    assert pipelines.ran(root) == twice
    second = _contents()
    assert second["artifacts/adapt/swav/lineage.json"] != first["artifacts/adapt/swav/lineage.json"]
    _git("commit", "-am", "four epochs")

    overrides.apply(["pretrain.swav.epochs=2"])
    with Workspace() as workspace:  # as the flow does
        assert workspace.run_stage("pretrain@swav", on_line=print).what == "restored"
        _repro("cluster@swav", "linear@swav")
        assert workspace.run_stage("adapt@swav", on_line=print).what == "restored"
    assert _contents() == first
    lineage.check(lineage.inputs("report", "swav"))
    _git("checkout", "--", ".")
    _repro("adapt@swav")
    assert _contents() == second
    assert pipelines.ran(root) == twice


def _reasons(stated: dict[str, Any]) -> Iterator[str]:
    """What of a stage of dvc.yaml keeps DVC from restoring it (3.67.1, dvc/stage: `cache._can_hash`, `Stage.run`)."""
    if stated.get("always_changed") or stated.get("frozen"):
        yield "a stage that always counts as changed is never looked up, a frozen one is left as it is"
    if not (stated.get("deps") or stated.get("params")) or not any(stated.get(kind) for kind in OUTS):
        yield "a stage is looked up by what it depends on, and its outs are what is restored"
    for dep in stated.get("deps", []):
        if "://" in dep:
            yield f"{dep}: only local deps have a hash to be looked up by"
    for kind in OUTS:
        for out in stated.get(kind, []):
            path, options = next(iter(out.items())) if isinstance(out, dict) else (out, {})
            if kind == "outs" and not options.get("cache", True):
                yield f"{path}: without cache only metrics and plots are restored; put it under one of these"
            if options.get("persist"):
                yield f"{path}: what a run finds of the last one is no function of its deps"
            if "://" in path or Path(path).is_absolute() or ".." in Path(path).parts:
                yield f"{path}: only what lies in the repository is restored"


def test_no_stage_says_anything_that_keeps_it_out_of_dvcs_run_cache() -> None:
    for name, stated in params.read(ROOT / "dvc.yaml")["stages"].items():
        assert not list(_reasons(stated.get("do", stated))), name


@pytest.mark.parametrize(
    ("change", "restored"),
    [
        ({"metrics": [{"m.json": {"cache": False}}], "plots": [{"p.csv": {"cache": False}}]}, True),
        ({"outs": ["out", {"p.csv": {"cache": False}}]}, False),  # findings/dvc_uncached_out_leaves_run_cache.sh
        ({"outs": [{"out": {"persist": True}}]}, False),
        ({"metrics": [{"m.json": {"persist": True}}]}, False),
        ({"outs": ["../out"]}, False),
        ({"outs": []}, False),
        ({"deps": [], "params": []}, False),
        ({"always_changed": True}, False),
        ({"frozen": True}, False),
    ],
)
def test_what_the_rule_forbids_is_what_dvc_does_not_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], *, restored: bool
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    command = "echo >>../ran; for file in out m.json p.csv; do cp params.yaml $file; done"
    stated = {"cmd": command, "deps": ["code"], "params": ["value"], "outs": ["out"]} | change
    Path("dvc.yaml").write_text(json.dumps({"stages": {"stage": stated}}), encoding="utf-8")
    Path("code").touch()
    Repo.init(no_scm=True).close()
    ran = []
    for value in (1, 2, 1):
        Path("params.yaml").write_text(f"value: {value}", encoding="utf-8")
        with Repo() as repo, suppress(DvcException):
            repo.reproduce()
        ran.append(len(Path("../ran").read_text()) if Path("../ran").exists() else 0)
    assert (ran == [1, 2, 2]) == restored == (not list(_reasons(stated)))


def test_clock_readings_beside_the_report_are_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    folder = layout.COSTS.parent
    command = f"mkdir -p {folder}; echo text >{layout.REPORT}; date +%N >{layout.COSTS}"
    stated = {"cmd": command, "params": ["value"], "outs": [folder.as_posix()]}
    Path("dvc.yaml").write_text(json.dumps({"stages": {"report": stated}}), encoding="utf-8")
    Path("params.yaml").write_text("value: 1", encoding="utf-8")
    Repo.init(no_scm=True).close()
    locks = []
    for _ in range(2):
        with Repo() as repo:
            repo.reproduce(force=True)
            layout.COSTS.write_text("changed")
            assert repo.status() == {}
            repo.checkout()
        assert layout.COSTS.read_text() == "changed"
        locks.append(Path("dvc.lock").read_bytes())
    assert locks[0] == locks[1]
