"""Temporary folders are removed at the end, or by the next start if their process was killed; nobody else's ever."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deepclust import temporary

_HOLDS = """
import sys
from pathlib import Path
from deepclust import temporary
with temporary.everything() as folder:
    (folder / "inside").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


def _start(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    variables = os.environ | {"TMPDIR": str(parent), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _HOLDS]
    process = subprocess.Popen(command, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_the_next_start_removes_what_a_killed_process_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (killed, left), (alive, held) = _start(tmp_path), _start(tmp_path)
    others = tmp_path / "others"
    (others / "kept").mkdir(parents=True)
    link, file, similar = (tmp_path / name for name in ("deepclust-run-link", "deepclust-run-file", "deepclust-seeds"))
    link.symlink_to(others)
    file.touch()
    similar.mkdir()
    killed.kill()
    killed.wait()
    assert (left / "inside").exists()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with temporary.folder(tmp_path):
            assert left.exists(), "it is another user's"
    with temporary.folder(tmp_path) as mine:
        assert mine.stat().st_mode & 0o777 == 0o700
        assert sorted(tmp_path.iterdir()) == sorted([held, mine, others, link, file, similar])
    alive.communicate("")
    assert sorted(tmp_path.iterdir()) == sorted([others, link, file, similar])
    assert (others / "kept").exists()


def test_everything_temporary_lies_in_the_folder_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    code = "import tempfile; print(tempfile.mkdtemp())"
    with temporary.everything() as folder:
        assert folder.parent == tmp_path
        assert Path(tempfile.mkdtemp()).parent == folder
        printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
        assert Path(printed.strip()).parent == folder
    assert os.environ["TMPDIR"] == str(tmp_path)
    assert tempfile.gettempdir() == str(tmp_path)
    assert not any(tmp_path.iterdir())
