"""Stages whose DVC is killed, and two at once in one workspace: real processes, a small Python parent for DVC."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest

from tasks.shared.outputs import layout
from tests.paths import ROOT
from tests.pipelines import eventually, within

# Writes its process id when it is at work; told to stop, it takes a second to save.
_STAGE = """
import os, sys, time
from pathlib import Path
from deepclust.errors import PreemptedError
from tasks.shared.operations.processes import launcher, preemption
from tasks.shared.outputs import layout, stage
with stage.running("pretrain") as here:
    (here.folder / "encoder").write_text(str(os.getpid()))
    with preemption.deferred() as told:
        Path("pid").write_text(str(os.getpid()))
        while not told() and not Path("enough").exists():
            time.sleep(0.05)
        if told():
            time.sleep(1)
            Path("saved").write_text(str(os.getpid()))
            raise PreemptedError("saved")
"""
_DVC = """
import os, subprocess, sys
command = ["sh", "-c", sys.argv[1]]
subprocess.run(command, env=os.environ | {"DVC_STAGE": "pretrain@pixels"})
"""
_COMMAND = f"{sys.executable} stage.py pixels"
_PARTIAL = Path("artifacts/pretrain/.pixels.partial")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for name in ("DVC_STAGE", "PET_NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    monkeypatch.chdir(tmp_path)
    Path("stage.py").write_text(_STAGE, encoding="utf-8")
    yield tmp_path
    for process in within(tmp_path):
        process.kill()


def _start(*command: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stderr=PIPE, text=True, env=os.environ | variables)


def _stage(patience: str) -> subprocess.Popen[str]:
    return _start(*_COMMAND.split(), PATIENCE=patience)


def _dvc(command: str) -> subprocess.Popen[str]:
    process = _start(sys.executable, "-c", _DVC, command)
    assert eventually(Path("pid").exists, 60)
    return process


# A shell that has only one command becomes that command.
@pytest.mark.parametrize("command", [_COMMAND, f"{_COMMAND}; true"])
def test_a_stage_whose_dvc_is_killed_saves_and_ends(command: str, here: Path) -> None:
    dvc = _dvc(command)
    dvc.kill()
    assert eventually(lambda: not within(here), 15)
    assert Path("saved").read_text() == Path("pid").read_text()
    assert dvc.communicate()[1].splitlines() == [
        f"warning: DVC (process {dvc.pid}), which started this stage, is gone; stopping",
        "preempted: saved",
    ]
    assert layout.preempted("pretrain", "pixels").exists()
    assert not _PARTIAL.exists()


def test_a_stage_that_is_told_to_stop_together_with_dvc_is_told_only_once(here: Path) -> None:
    dvc = subprocess.Popen([sys.executable, "-c", _DVC, _COMMAND], stderr=PIPE, text=True, start_new_session=True)
    assert eventually(Path("pid").exists, 60)
    os.killpg(dvc.pid, signal.SIGTERM)
    assert dvc.communicate(timeout=60)[1] == "preempted: saved\n", "a second signal would have kept it from saving"
    assert eventually(lambda: not within(here), 5)


def test_a_stage_that_hears_no_signal_is_killed_in_the_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("stage.py").write_text(
        "import signal, time\nfrom pathlib import Path\nfrom tasks.shared.operations.processes import orphans\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\norphans._GRACE = 1\norphans.end_with_dvc()\n"
        "Path('pid').touch()\nwhile True:\n    time.sleep(1)\n"
    )
    _dvc(_COMMAND).kill()
    assert eventually(lambda: not within(here), 15)


def test_a_stage_that_dvc_did_not_live_to_see_ends_too(here: Path) -> None:
    late = _STAGE.replace("with stage", "Path('pid').touch()\ntime.sleep(1)\nwith stage", 1)
    Path("stage.py").write_text(late, encoding="utf-8")
    _dvc(_COMMAND).kill()
    assert eventually(lambda: not within(here), 15)
    assert not _PARTIAL.exists()


def test_a_second_run_of_a_stage_waits_for_the_first_or_says_who_is_at_work(here: Path) -> None:
    short = _STAGE.replace("with stage", "stage._patience = lambda: float(os.environ['PATIENCE'])\nwith stage", 1)
    Path("stage.py").write_text(short, encoding="utf-8")
    first = _stage("0")
    assert eventually(Path("pid").exists, 60)
    vain, patient = _stage("0.2"), _stage("60")
    assert patient.stderr
    line = patient.stderr.readline()
    assert line.startswith(f"pretrain@pixels waits for another that is at work (process {first.pid} on ")
    _, error = vain.communicate(timeout=60)
    assert (vain.returncode, error.count("\n")) == (2, 1)
    assert error.startswith(
        "error: expected to be the only one at pretrain@pixels, but another holds state/pretrain@pixels.lock (process "
        f"{first.pid} on "
    )
    assert error.endswith("); wait for it or stop it, and run again\n")
    assert (_PARTIAL / "encoder").read_text() == str(first.pid), "nobody else has touched it"
    Path("enough").touch()
    first.kill()
    assert patient.wait(60) == 0, "the kernel gave it the lock"
    assert Path("artifacts/pretrain/pixels/encoder").read_text() == str(patient.pid)
    assert not _PARTIAL.exists()


def test_processes_that_have_lost_their_launcher_before_they_join_end(here: Path) -> None:
    Path("body.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom tasks.shared.operations.processes import launcher\n"
        "if not launcher.is_worker():\n    sys.exit(launcher.start('body', sys.argv[1:]))\n"
        "Path('pid').touch()\nwhile not Path('enough').exists():\n    time.sleep(0.05)\n"
        "with launcher.joined():\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "body.py"], env=os.environ | {"PET_NPROC_PER_NODE": "2"})
    assert eventually(Path("pid").exists, 60)
    assert len(psutil.Process(process.pid).children()) == 2
    process.kill()
    process.wait()
    Path("enough").touch()
    assert eventually(lambda: not within(here), 15)
