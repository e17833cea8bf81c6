"""A run of `pretrain` with other parameters than the last finished one says that it begins anew, and what is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tasks.shared.operations import params
from tasks.shared.operations.observers import earlier_run
from tasks.shared.operations.params import overrides
from tasks.shared.outputs import layout
from tests.paths import ROOT
from tests.tasks import small_run

KEPT = "what `dvc repro` made here stays in DVC's cache, and the earlier values restore it in seconds"
SCHEDULE = "the learning-rate schedule spans all epochs, so the encoder of 2 epochs is not continued"
ANEW = f"swav: begins anew with epochs 2 → 4 since the last finished run ({SCHEDULE}); "


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SwAV was trained for 2 epochs by `dvc repro`, with the learning rate .4."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    edits = ["pretrain.swav.epochs=2", "pretrain.swav.optimiser.rate=0.4", "pretrain.swav.batch_size=128"]
    overrides.apply(edits)
    now = params.read()
    locked = {f"pretrain.{name}": now["pretrain"][name] for name in ("shared", "swav")} | {"seed": now["seed"]}
    stage = {"cmd": "python -m tasks.pretrain swav", "params": {"params.yaml": locked}}
    Path("dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": {"pretrain@swav": stage}}))


@pytest.mark.usefixtures("workspace")
def test_changed_parameters_are_named_with_what_is_kept_and_without_any_or_an_earlier_run_nothing_is() -> None:
    assert earlier_run.difference("swav") == ""
    assert earlier_run.difference("pcl") == "", "it has never run"
    overrides.apply(["pretrain.shared.batch_size=512"])
    assert earlier_run.difference("swav") == "", "SwAV has a batch size of its own"
    overrides.apply(["pretrain.swav.epochs=4"])
    assert earlier_run.difference("swav") == ANEW + KEPT
    overrides.apply(["pretrain.swav.epochs=2", "seed=1", "pretrain.swav.optimiser.rate=0.3"])
    changes = "seed 0 → 1, optimiser.rate 0.4 → 0.3"
    assert earlier_run.difference("swav") == f"swav: begins anew with {changes} since the last finished run; {KEPT}"
    Path("dvc.lock").write_text("<<<<<<< ours")
    assert earlier_run.difference("swav") == ""


def test_the_first_line_of_a_longer_run_by_hand_says_that_it_begins_anew_and_replaces_the_shorter_ones_encoder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides.apply(["pretrain.swav.epochs=4"])
    small_run.run("pretrain", monkeypatch, "swav")
    line, _ = capsys.readouterr().out.split("\n", 1)
    assert line == f"{ANEW}the encoder in {layout.out('pretrain', 'swav')} is replaced at the end; {KEPT}"
    small_run.run("pretrain", monkeypatch, "swav")
    assert "begins anew" not in capsys.readouterr().out
