"""A pretraining run that was cut off ends as if it had never stopped; what cannot go on is refused."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from deepclust.errors import CheckpointError
from deepclust.training import checkpoint, loop, resume
from tasks.shared.operations import costs
from tasks.shared.operations.observers import checkpoints
from tasks.shared.operations.params import overrides
from tasks.shared.outputs import layout
from tests.tasks import small_run


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small_run.build(folder)
        overrides.apply(["pretrain.checkpoint={every_steps: 1, every_seconds: null, keep: 2}"])
        small_run.run("prepare", patch)
    return folder


@pytest.fixture(autouse=True)
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outputs(encoder: str) -> dict[str, bytes]:
    """Everything that the stage writes."""
    files = [path for path in layout.out("pretrain", encoder).rglob("*") if path.is_file()]
    files += [layout.metrics("pretrain", encoder), layout.curve("pretrain", encoder)]
    return {str(path): path.read_bytes() for path in files}


def straight(encoder: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The outputs of a run that nobody stops: two epochs of five updates."""
    small_run.run("pretrain", monkeypatch, encoder)
    assert '"steps": 10' in layout.metrics("pretrain", encoder).read_text()
    found = outputs(encoder)
    shutil.rmtree(layout.ARTIFACTS / "pretrain")
    return found


def killed_after(step: int, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is gone once it has dealt with an update, whose state it may have saved."""
    after = resume.Keeper.after

    def die(self: resume.Keeper, done: int, wishes: list[float]) -> None:
        after(self, done, wishes)
        if done == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(resume.Keeper, "after", die)
        with pytest.raises(Killed):
            small_run.run("pretrain", patch, encoder)


@pytest.mark.parametrize(
    ("encoder", "step"), [("swav", 3), ("deepcluster_v2", 5), ("moco", 1), ("pcl", 6), ("simsiam", 8)]
)
def test_a_killed_run_goes_on_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, encoder: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = straight(encoder, monkeypatch)
    killed_after(step, encoder, monkeypatch)
    assert not layout.out("pretrain", encoder).exists()
    capsys.readouterr()
    small_run.run("pretrain", monkeypatch, encoder)
    assert f"goes on after update {step + 1}" in capsys.readouterr().out
    assert outputs(encoder) == expected
    assert not any(layout.runs(encoder).iterdir()), "the state of a run that has ended is removed"


def test_between_two_checkpoints_updates_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides.apply(["pretrain.checkpoint={every_steps: 3, every_seconds: null, keep: 1}"])
    expected = straight("swav", monkeypatch)
    killed_after(4, "swav", monkeypatch)
    assert [path.name for path in next(layout.runs("swav").iterdir()).iterdir()] == ["step-00000003"]
    small_run.run("pretrain", monkeypatch, "swav")
    assert outputs("swav") == expected


def test_a_run_that_is_told_to_stop_saves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides.apply(["pretrain.checkpoint={every_steps: null, every_seconds: null, keep: 1}"])
    expected = straight("pcl", monkeypatch)
    check = loop._Update.check

    def tell(self: Any, *values: float, where: str, rate: float) -> None:
        if where.startswith("step 6 "):
            os.kill(os.getpid(), signal.SIGTERM)
        check(self, *values, where=where, rate=rate)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Update, "check", tell)
        with pytest.raises(SystemExit, match="143"):
            small_run.run("pretrain", patch, "pcl")
    assert capsys.readouterr().err.splitlines()[-1].startswith("preempted: stopped after update ")
    assert layout.preempted("pretrain", "pcl").exists()
    begin = time.monotonic()
    small_run.run("pretrain", monkeypatch, "pcl")
    seconds = time.monotonic() - begin
    assert not layout.preempted("pretrain", "pcl").exists()
    assert outputs("pcl") == expected
    cost = costs.reading("pretrain", "pcl")
    assert cost is not None
    assert cost["seconds"] > seconds, "the first part is counted too"


def refusal(encoder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refused run."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        small_run.run("pretrain", monkeypatch, encoder)
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_required_state_that_is_not_there_or_of_something_else_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEEPCLUST_RESUME", "require")
    assert "found none; or set pretrain.resume to auto" in refusal("swav", monkeypatch, capsys)
    monkeypatch.delenv("DEEPCLUST_RESUME")
    killed_after(2, "swav", monkeypatch)
    overrides.apply(["pretrain.resume=require", "seed=1"])
    assert "of other parameters" in refusal("swav", monkeypatch, capsys)
    overrides.apply(["seed=0"])
    real = checkpoints.fingerprint
    for part in ("code", "data"):
        monkeypatch.setattr(checkpoints, "fingerprint", lambda here, part=part: real(here) | {part: "0" * 64})
        assert f"of other {part}" in refusal("swav", monkeypatch, capsys)
    monkeypatch.setenv("DEEPCLUST_RESUME", "auto")
    small_run.run("pretrain", monkeypatch, "swav")
    assert "goes on" not in capsys.readouterr().out


def test_a_forced_run_begins_anew_and_a_mode_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_after(2, "simsiam", monkeypatch)
    monkeypatch.setenv("DEEPCLUST_RESUME", "maybe")
    assert "expected one of auto, require, never; got 'maybe'" in refusal("simsiam", monkeypatch, capsys)
    monkeypatch.setenv("DEEPCLUST_RESUME", "never")
    small_run.run("pretrain", monkeypatch, "simsiam")
    assert "goes on" not in capsys.readouterr().out


def test_a_damaged_newest_state_gives_way_to_the_one_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = straight("moco", monkeypatch)
    killed_after(5, "moco", monkeypatch)
    newest = max(next(layout.runs("moco").iterdir()).iterdir())
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    capsys.readouterr()
    small_run.run("pretrain", monkeypatch, "moco")
    said = capsys.readouterr()
    assert f"{newest.name} is damaged" in said.err
    assert "goes on after update 5" in said.out
    assert outputs("moco") == expected


def test_a_state_that_cannot_be_removed_does_not_fail_a_run_that_has_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint.Store, "clear", Mock(side_effect=CheckpointError("expected to remove all")))
    small_run.run("pretrain", monkeypatch, "simsiam")
    assert "warning: expected to remove all" in capsys.readouterr().err
    assert layout.out("pretrain", "simsiam").is_dir()


def test_only_a_few_unfinished_runs_of_an_encoder_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_KEPT", 2)
    for epochs in (2, 3, 4):
        overrides.apply([f"pretrain.simsiam.epochs={epochs}"])
        killed_after(1, "simsiam", monkeypatch)
    assert len(list(layout.runs("simsiam").iterdir())) == 2
