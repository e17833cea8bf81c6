"""Isolated runs: worktrees beside each other and beside the workspace, which stays as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from flows import isolated
from flows.pipeline import pretrain_and_eval
from tasks.shared.operations import params, store, tracking
from tasks.shared.operations.params import overrides
from tasks.shared.operations.processes import dvc_runner
from tasks.shared.operations.processes.dvc_runner import StageError, Workspace
from tests import pipelines
from tests.paths import ROOT


def git(*arguments: str, at: Path | None = None) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=at, check=True, capture_output=True, text=True).stdout.strip()


def state_of(root: Path) -> tuple[str, str, bytes]:
    """What git says of a workspace, and the file that runs edit."""
    return git("status", "--porcelain", at=root), git("stash", "list", at=root), (root / "params.yaml").read_bytes()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose stages have run, with everything in git."""
    root = tmp_path_factory.mktemp("built") / "workspace"
    pipelines.build(root)
    shutil.copy(ROOT / ".gitignore", root)
    shutil.copy(ROOT / ".dvcignore", root)
    text = (root / "dvc.yaml").read_text()
    data = 'deps: ["${data.folder}", "${adapt.domains}"]\n    params: [seed]'
    (root / "dvc.yaml").write_text(text.replace("params: [seed]", data, 1))
    overrides.apply(["adapt.domains=../outside"], root / "params.yaml")
    for file in ("data/README.md", "data/photos/1.png", "../outside/shot.png"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(file)
    with (root / ".gitignore").open("a") as ignored:
        ignored.write("/.dvc/config.local\n/.dvc/tmp\n/.dvc/cache\n/data/*\n!/data/README.md\n")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], cwd=root, check=True)
    git("add", "--all", at=root)
    git("commit", "--quiet", "--message=all", at=root)
    return root


@pytest.fixture
def root(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder."""
    shutil.copytree(built.parent, tmp_path, dirs_exist_ok=True, symlinks=True)
    root = tmp_path / "workspace"
    (root / "state/ran").unlink()
    monkeypatch.chdir(root)
    return root


def brought_up_to_date() -> str:
    """What came of `prepare`, on whose output, which is always the same, all others depend."""
    with Workspace() as workspace:
        unchanged = workspace.unchanged() == set(workspace.graph)
        return "unchanged" if unchanged else workspace.run_stage("prepare", on_line=lambda _: None).what


def test_what_the_workspace_has_computed_is_there_and_what_differs_is_computed_here_alone(root: Path) -> None:
    (root / "stage.sh").write_text((root / "stage.sh").read_text() + "# not committed\n")
    before = state_of(root)
    values = params.load()
    with isolated.worktree("Brave Otter!", values) as folder:
        assert (folder, isolated.current()) == (root / "state/isolated/brave-otter", "brave-otter")
        assert (folder / "stage.sh").read_text().endswith("# not committed\n")
        assert brought_up_to_date() == "unchanged", (
            "all is up to date, from the workspace's cache and over links to its data"
        )
        overrides.apply(["seed=5"])
        assert brought_up_to_date() == "run"
        assert not git("status", "--porcelain", "--untracked-files=no", "--", "data", at=folder)
    assert (isolated.current(), state_of(root)) == ("", before)
    assert not (root / "state/ran").exists()

    with isolated.worktree("brave-otter", values) as folder:
        assert folder.name == "brave-otter-2"
        overrides.apply(["seed=5"])
        assert brought_up_to_date() == "restored", "from the run cache that both share"
    assert state_of(root) == before


@pytest.fixture
def ended(root: Path) -> Path:
    """An isolated run of another seed that has ended."""
    with isolated.worktree("ended", params.load()) as folder:
        overrides.apply(["seed=5"])
        brought_up_to_date()
    return folder


def test_the_commands_that_come_next_compare_take_over_and_remove(
    root: Path, ended: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = dict(re.findall(r"^([a-z ]+): +(.+)$", isolated.next_steps("ended"), re.MULTILINE))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    (root / "plots").mkdir()  # which this small pipeline lacks
    (ended / "plots").mkdir()
    compared = subprocess.run(steps["compare"], shell=True, check=True, capture_output=True, text=True).stdout
    assert re.search(r"params.yaml +seed +0 +5", compared)
    subprocess.run(steps["take over"], shell=True, check=True, capture_output=True)
    assert params.load().seed == 5
    assert brought_up_to_date() == "unchanged"
    assert not (root / "state/ran").exists()

    monkeypatch.setattr(sys, "argv", ["isolated", "list"])
    isolated.main()
    assert capsys.readouterr().out == "ended  ended    seed: 5\n"
    name = steps["remove"].rpartition(" ")[2]
    with isolated._alone(ended):  # as a flow does
        monkeypatch.setattr(sys, "argv", ["isolated", "list"])
        isolated.main()
        monkeypatch.setattr(sys, "argv", ["isolated", "remove", name])
        with pytest.raises(SystemExit):
            isolated.main()
    out, err = capsys.readouterr()
    assert out.startswith("ended  running ")
    assert re.fullmatch(r"error: expected to be the only flow in .*/ended, but one already runs there.*\n", err)
    with Workspace():  # what runs in the workspace is not in the way
        isolated.main()
    assert isolated.names() == []
    assert git("worktree", "list", at=root).count("\n") == 0
    assert (root / "data/photos/1.png").exists()


def test_a_name_is_never_a_path_and_never_leads_out_of_the_folder(root: Path, tmp_path: Path) -> None:
    (root / "state/isolated").mkdir()
    (root / "state/isolated/link").symlink_to(tmp_path)
    for name in ("..", "../..", "link", "a/b", "A", "none", "-f"):
        with pytest.raises(StageError, match="expected an isolated run"):
            isolated.folder(name)
        with pytest.raises(StageError, match="expected an isolated run"):
            isolated.remove(name)
    with pytest.raises(StageError, match="expected an isolated run"):
        isolated.remove("")
    assert isolated.folder("") == Path()


def _fails(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_can_not_be_isolated_is_one_line_and_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = params.load()

    def refused(match: str, values: Any = values) -> None:
        with pytest.raises(StageError, match=match), isolated.worktree("run", values):
            pytest.fail("a worktree was made")
        assert isolated.names() == []
        assert git("worktree", "list", at=root).count("\n") == 0

    refused(r"write it as .*/outside$", overrides.preview(["data.source=folder", "data.folder=../../../outside"]))
    (root / "tasks").mkdir()
    (root / "tasks/new.py").touch()
    refused("it does not know tasks/new.py; git add tasks/new.py")
    (root / "tasks/new.py").unlink()
    (root / ".gitmodules").touch()
    refused("expected no submodules")
    (root / ".gitmodules").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(dvc_runner, "share_cache", _fails)
        refused("got: No space left on device; make room")
    with (
        isolated.worktree("outer", values),
        pytest.raises(StageError, match="got the isolated run outer"),
        isolated.worktree("inner", values),
    ):
        pass
    isolated.remove("outer")
    git("update-ref", "-d", "HEAD")
    refused("expected a git repository with a commit")


_RUN = """
import sys
from flows import isolated
from tasks.shared.operations.params import overrides
from tasks.shared.operations.processes.dvc_runner import Workspace
with isolated.worktree("run", overrides.preview(sys.argv[1:])) as folder, Workspace() as workspace:
    overrides.apply(sys.argv[1:])
    print(folder.name, workspace.run_stage("prepare", on_line=lambda _: None).what)
"""


def test_two_that_begin_at_once_have_worktrees_of_their_own_and_add_to_one_cache(root: Path) -> None:
    def run(seed: int) -> str:
        command = [sys.executable, "-c", _RUN, f"seed={seed}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    with ThreadPoolExecutor() as pool:
        assert sorted(pool.map(run, (7, 8))) == ["run run\n", "run-2 run\n"]


def test_the_flow_runs_in_the_worktree_and_its_run_is_beside_the_others_in_one_store(
    root: Path, prefect: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = state_of(root)
    tags, places = [], []

    def open_pipeline(_: str, own: dict[str, str]) -> str:
        tags.append({key: value for key, value in own.items() if not key.startswith("prefect")})
        places.append((store.uri(), Path("mlartifacts").resolve()))
        return ""

    monkeypatch.setattr(tracking, "open_pipeline", open_pipeline)
    with Workspace():  # another flow's
        refused = pretrain_and_eval(return_state=True)
        assert refused.is_failed()
        assert (refused.message or "").endswith("or run beside it in a worktree of its own: isolated: true")
        state = pretrain_and_eval.with_options(flow_run_name="Seed 9")(
            overrides=["seed=9"], isolated=True, return_state=True
        )
    assert (state.is_completed(), state.message) == (True, "4 stages up to date in state/isolated/seed-9")
    assert "remove:     python -m flows.isolated remove seed-9" in caplog.text
    assert tags == [{"isolated": "seed-9", "overrides": "seed=9"}]
    assert places == [(f"sqlite:///{root}/mlflow.db", root / "mlartifacts")]
    assert (Path.cwd(), state_of(root)) == (root, before)
    with chdir("state/isolated/seed-9"):  # gone on with, as after a kill
        assert pretrain_and_eval(stages=["embed"], return_state=True).is_completed()
    assert pipelines.ran(root) == []
    assert pipelines.ran(root / "state/isolated/seed-9") == ["prepare"]
