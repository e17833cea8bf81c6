"""Signals that wait for a safe moment, and the marker that tells the flow."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest

from deepclust.errors import DataError, PreemptedError
from tasks.shared.operations.processes import preemption, signals
from tasks.shared.outputs import layout, stage
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The marker of a stage that is about to run."""
    monkeypatch.setattr(signals, "came", [])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    monkeypatch.setattr(sys, "argv", ["tasks.pretrain", "pixels"])
    return tmp_path / layout.preempted("pretrain", "pixels")


def test_a_signal_inside_is_noted_and_a_second_one_ends_the_process_unless_torchrun_tells_it_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with preemption.deferred() as told:
        assert (told(), preemption.status()) == (0, 143)
        signal.raise_signal(signal.SIGINT)
        assert (told(), preemption.status()) == (signal.SIGINT, 130)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with preemption.deferred() as told:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert told() == signal.SIGTERM


def test_a_preempted_stage_is_one_line_the_signals_status_and_a_marker(
    marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="130"), stage.running("pretrain"), preemption.deferred():
        raise signal.raise_signal(signal.SIGINT) or PreemptedError("saved at step 7")
    assert capsys.readouterr().err == "preempted: saved at step 7\n"
    assert marker.exists()
    assert not list(Path("artifacts/pretrain").iterdir())


def test_a_stage_is_marked_if_it_is_told_to_stop_before_it_can_save_but_not_if_torchrun_ends_it_or_it_fails(
    marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="143"), stage.running("pretrain"):
        signal.raise_signal(signal.SIGTERM)
    assert marker.exists()
    with pytest.raises(SystemExit, match="2"), stage.running("pretrain"):
        raise DataError("expected images, got none; add some")
    assert not marker.exists(), "an old one is removed too"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setattr("tasks.shared.operations.processes.worker._leave", sys.exit)
    with pytest.raises(SystemExit, match="143"), stage.running("pretrain"):
        signal.raise_signal(signal.SIGTERM)
    assert not marker.exists()


def test_the_outermost_handler_of_sigterm_is_the_only_one() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.sigterm_exits():
        ours = signal.getsignal(signal.SIGTERM)
        with signals.sigterm_exits():
            assert signal.getsignal(signal.SIGTERM) is ours
        assert signal.getsignal(signal.SIGTERM) is ours
        with pytest.raises(SystemExit) as stop:
            signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
