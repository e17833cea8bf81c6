"""What DVC's cache holds is checked against its hash before it is restored; a damaged file is removed and made anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dvc.repo import Repo

from deepclust.errors import StageError
from tasks import verify
from tasks.shared.operations.processes import dvc_runner
from tasks.shared.operations.processes.dvc_runner import Workspace
from tests import pipelines

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of DVC's own calls
CACHE = Path(".dvc/cache")
# Writes two files and a metric.
_STAGE = """
stages:
  made:
    cmd: echo ran >>state/ran && mkdir out && cp params.yaml out/one && echo two >out/two && echo {} >m.json
    params: [seed]
    outs: [out]
    metrics: [m.json: {cache: false}]
"""


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The outputs of a stage that DVC has in its cache, and its lock."""
    pipelines.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["verify"])
    (tmp_path / "state").mkdir()
    Path("dvc.yaml").write_text(_STAGE, encoding="utf-8")
    with Workspace() as workspace:
        assert workspace.run_stage("made", on_line=print).what == "run"
    return _contents()


def _contents() -> dict[str, bytes]:
    return {path: Path(path).read_bytes() for path in ("out/one", "out/two", "m.json", "dvc.lock")}


def _object(kind: str) -> Path:
    """A file of the cache: of an output, of the list of a folder's outputs, or the record of a run."""
    if kind == "record":
        return next(CACHE.glob("runs/*/*/*"))
    objects = {path.read_bytes(): path for path in CACHE.glob("files/md5/??/*")}
    return next(path for text, path in objects.items() if (path.suffix == ".dir") == (kind == "list") and b"{" in text)


def _damage(path: Path, how: str) -> None:
    """Change a read-only file in place, as a bad disk does: mode and time stay."""
    stat, content = path.stat(), path.read_bytes()
    path.chmod(0o644)
    path.write_bytes({"emptied": b"", "cut": content[: len(content) // 2], "junk": b"[{}]\xff"}.get(how, how.encode()))
    path.chmod(stat.st_mode)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


DAMAGE = [
    *(("output", "emptied"), ("output", "cut")),
    *(("list", "cut"), ("list", "[{}]"), ("list", "[]")),
    *(("record", "emptied"), ("record", "junk"), ("record", "cmd: echo\nouts: []\n")),
]


def test_what_is_damaged_is_said_in_a_line_and_made_anew(before: dict[str, bytes]) -> None:
    with Workspace() as workspace:
        for kind, how in DAMAGE:
            path = _object(kind)
            _damage(path, how)
            Path("out/one").unlink()
            if kind == "record":  # with its outputs in dvc.lock a stage needs none
                Path("dvc.lock").unlink()
            lines: list[str] = []
            assert workspace.run_stage("made", on_line=lines.append).what == "run"
            warnings = [line for line in lines if line.startswith("warning: ")]
            assert warnings == [
                f"warning: {path} in DVC's cache was damaged and is removed; what needs it is made anew"
            ]
            assert _contents() == before
        Path("out/one").unlink()
        assert workspace.run_stage("made", on_line=print).what == "restored"
    assert _contents() == before


def _repro() -> None:
    """As plain `dvc repro` does."""
    with Repo() as repo:
        repo.reproduce()


def test_the_command_removes_what_plain_dvc_restores_and_even_keeps_where_the_stage_runs_again(
    before: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    verify.main()
    assert capsys.readouterr().out == "DVC's cache is whole\n"
    _damage(_object("output"), "junk")
    Path("out/one").unlink()
    _repro()
    assert _contents() != before, "DVC checks by itself: tasks.verify and the flow's own check can go"
    for kind in ("list", "record"):
        _damage(_object(kind), "cut")
    verify.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.startswith("warning: .dvc/cache/") for line in lines] == [True] * 3
    assert last == "3 damaged files removed; run `dvc repro`"
    _repro()
    assert _contents() == before
    capsys.readouterr()
    verify.main()
    assert capsys.readouterr().out == "DVC's cache is whole\n"


def test_without_a_workspace_of_dvcs_the_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match="DVC can not read the cache"):
        dvc_runner.drop_damaged()
