"""A stage whose parameters, code or inputs change while it runs is refused, and no other one."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.repo import Repo

from deepclust.errors import StageError
from tasks.shared.operations import params, provenance, snapshot
from tasks.shared.operations.processes.dvc_runner import Workspace
from tasks.shared.outputs import layout, lineage
from tests import pipelines
from tests.paths import ROOT

CODE = Path("deepclust/training/code.py")
IMAGES, DESCRIBED = layout.images(16) / "train.npy", layout.statistics("swav")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with code, prepared data and two folders of images."""
    for dep in (dep for stage in layout.STAGES for dep in provenance.code_deps(stage, "swav")):
        _parent(tmp_path / dep / "code.py" if (ROOT / dep).is_dir() else tmp_path / dep).touch()
    for file in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    for file in (IMAGES, layout.META, Path("data/a/1.png"), Path("data/b/2.png"), Path("domains/x")):
        _parent(file).write_text(file.name)
    _parent(DESCRIBED).write_text('{"image_size": 16}')
    lineage.write(layout.PREPARED, {})
    return tmp_path


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _edit(before: str, after: str, path: Path = layout.PARAMS) -> Callable[[], object]:
    def edit() -> None:
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after, 1))

    return edit


def _write(path: Path | str, text: str = "new") -> Callable[[], object]:
    return lambda: _parent(Path(path)).write_text(text)


def _touch(path: Path | str) -> Callable[[], object]:
    return lambda: os.utime(path, (1, 1))


def _prepare_again() -> None:
    IMAGES.write_text("others")
    lineage.write(layout.PREPARED, {})


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        (
            "pretrain",
            _edit("\n    temperature: 0.1", "\n    temperature: 0.9"),
            "pretrain.swav.temperature (0.1 → 0.9)",
        ),
        ("pretrain", _edit("batch_size: 256", "batch_size: 128"), "pretrain.shared.batch_size (256 → 128)"),
        ("pretrain", _edit("swav: swav", "swav: pcl"), "encoders.swav (swav → pcl)"),
        ("pretrain", _edit("epochs: 3", "epochs: 9"), None),
        ("pretrain", _edit("k: classes", "k: 3"), None),
        ("pretrain", _write("params.yaml", "a: ["), "params.yaml is not valid YAML"),
        ("pretrain", lambda: Path("params.yaml").unlink(), "found none"),
        ("pretrain", _write(CODE, "pass"), CODE.name),
        ("pretrain", _touch(CODE), None),
        ("pretrain", _write(CODE.with_name(".code.py.swp")), None),
        ("pretrain", _write("deepclust/methods/pcl.py"), None),
        ("pretrain", _write(IMAGES, "other"), str(IMAGES)),
        ("pretrain", _touch(IMAGES), None),
        ("pretrain", _prepare_again, str(IMAGES)),
        ("pretrain", lambda: shutil.rmtree("artifacts"), str(IMAGES)),
        ("pretrain", _write(layout.META, "other"), None),
        ("prepare", _edit("resize: crop", "resize: pad"), "data.resize (crop → pad)"),
        ("prepare", _write("data/b/3.png"), "data/b"),
        ("prepare", _write("data/b/2.png", "other"), "data/b"),
        ("prepare", lambda: shutil.rmtree("data"), "data"),
        ("prepare", _write("data/.DS_Store"), None),
        ("adapt", _write("domains/new/x.png"), "domains/new"),
        ("adapt", _write("data/b/3.png"), None),
        ("report", _write("metrics/embed/swav.json"), "metrics/embed/swav.json"),
    ],
)
def test_what_the_stage_works_from_and_nothing_else_must_stay(
    here: Path, stage: str, change: Callable[[], object], said: str | None
) -> None:
    encoder, method = (None, "") if stage in layout.ONCE else ("swav", "swav")
    before = snapshot.take(stage, encoder, params.read(), method=method)
    before.check()
    change()
    if said is None:
        before.check()
        return
    with pytest.raises(StageError) as refused:
        before.check()
    assert said in str(refused.value)
    assert "; nothing was written: run it again" in str(refused.value)


def test_a_link_that_leads_round_in_a_circle_is_entered_once_and_what_it_leads_to_counts_where_it_is_followed(
    here: Path,
) -> None:
    Path("elsewhere").mkdir()
    Path("data/linked").symlink_to(Path("elsewhere").absolute())
    Path("data/a/round").symlink_to(Path("data").absolute())
    unfollowed = snapshot.take("prepare", None, params.read(), method="")
    Path("elsewhere/file").touch()
    unfollowed.check()
    _edit("follow_links: false", "follow_links: true")()
    followed = snapshot.take("prepare", None, params.read(), method="")
    Path("elsewhere/file").write_text("new")
    with pytest.raises(StageError, match="changed: data/linked;"):
        followed.check()


def test_code_that_was_edited_after_the_process_began_to_load_it_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "tasks.prepare"])
    file = Path("tasks/prepare/code.py")
    for path in (path for folder in ("tasks", "deepclust") for path in Path(folder).rglob("*")):
        os.utime(path, (1, 1))
    snapshot.take("prepare", None, params.read(), method="")
    os.utime(file, (ahead := time.time() + 3600, ahead))  # of a clock that is wrong
    snapshot.take("prepare", None, params.read(), method="")
    monkeypatch.setattr("psutil.Process.create_time", lambda _: time.time() - 10)
    os.utime(file)
    with pytest.raises(StageError, match=rf"but {file} was edited; run again"):
        snapshot.take("prepare", None, params.read(), method="")


# Stands for a stage: edits what the file `edit` names before it ends.
_STAGE = """
import sys
from pathlib import Path
sys.argv = sys.argv[:1]
from tasks.shared.outputs import stage
with stage.running("prepare") as here:
    (here.folder / "made").write_text(str(here.params.seed))
    here.metrics({"seed": here.params.seed})
    if Path("edit").exists():
        before, after = Path("edit").read_text().split(" to ")
        Path("params.yaml").write_text(Path("params.yaml").read_text().replace(before, after))
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of DVC's own calls
def test_dvc_records_no_values_that_came_while_the_stage_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipelines.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    Path("made.py").write_text(_STAGE, encoding="utf-8")
    Path("dvc.yaml").write_text(
        f"stages:\n  prepare:\n    cmd: {sys.executable} made.py\n    params: [seed, data]\n"
        "    outs: [artifacts/prepare]\n    metrics: [metrics/prepare.json: {cache: false}]\n",
        encoding="utf-8",
    )
    Path("edit").write_text("seed: 0 to seed: 7")
    with Workspace() as workspace, pytest.raises(StageError, match=r"^prepare failed: expected .* seed \(0 → 7\); not"):
        workspace.run_stage("prepare", on_line=print)
    assert not Path("dvc.lock").exists()
    assert [*Path("artifacts").iterdir(), *Path("metrics").glob("*")] == []
    Path("edit").write_text("k: classes to k: 7")
    with Repo() as repo:
        assert repo.reproduce()
    assert "seed: 7" in Path("dvc.lock").read_text()
    assert Path("artifacts/prepare/made").read_text() == "7"
    with Repo() as repo:
        assert repo.status() == {}
