"""Signals that wait for a safe moment, and the marker that tells the flow."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from deepclust.errors import DataError, PreemptedError
from tasks.shared.operations.processes import preemption, signals
from tasks.shared.outputs import layout, stage
from tests.paths import ROOT

MARKER = layout.preempted("pretrain", "pixels")


@pytest.fixture(autouse=True)
def patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Where a stage is about to run."""
    monkeypatch.setattr(signals, "came", [])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    (tmp_path / "params.yaml").symlink_to(ROOT / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    monkeypatch.setattr(sys, "argv", ["tasks.pretrain", "pixels"])
    return monkeypatch


def test_a_signal_is_noted_and_a_second_one_ends_the_process_unless_it_is_torchruns(patch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with preemption.deferred() as told:
        assert (told(), preemption.status()) == (0, 143)
        signal.raise_signal(signal.SIGINT)
        assert (told(), preemption.status()) == (signal.SIGINT, 130)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
    patch.setenv("TORCHELASTIC_RUN_ID", "run")
    with preemption.deferred() as told:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert told() == signal.SIGTERM


def test_a_stage_told_to_stop_is_one_line_the_signals_status_and_a_marker_unless_torchrun_ends_it(
    patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="130"), stage.running("pretrain"), preemption.deferred():
        raise signal.raise_signal(signal.SIGINT) or PreemptedError("saved at step 7")
    assert capsys.readouterr().err == "preempted: saved at step 7\n"
    assert MARKER.exists()
    assert not list(Path("artifacts/pretrain").iterdir())
    MARKER.unlink()
    with pytest.raises(SystemExit, match="143"), stage.running("pretrain"):
        signal.raise_signal(signal.SIGTERM)
    assert MARKER.exists(), "though it could not save"
    with pytest.raises(SystemExit, match="2"), stage.running("pretrain"):
        raise DataError("expected images, got none; add some")
    assert not MARKER.exists(), "an old one is removed too"
    patch.setenv("TORCHELASTIC_RUN_ID", "run")
    patch.setattr("tasks.shared.operations.processes.worker._leave", sys.exit)
    with pytest.raises(SystemExit, match="143"), stage.running("pretrain"):
        signal.raise_signal(signal.SIGTERM)
    assert not MARKER.exists()


def test_the_outermost_handler_of_sigterm_is_the_only_one() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.sigterm_exits():
        ours = signal.getsignal(signal.SIGTERM)
        with signals.sigterm_exits():
            assert signal.getsignal(signal.SIGTERM) is ours
        assert signal.getsignal(signal.SIGTERM) is ours
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
