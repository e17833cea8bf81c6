"""Signals that wait for a safe moment, and the marker that tells the flow."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

from deepclust.errors import DataError, PreemptedError
from tasks.shared.operations.processes import preemption, signals
from tasks.shared.outputs import layout, stage
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "came", [])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    monkeypatch.setattr(sys, "argv", ["tasks.pretrain", "pixels"])
    return tmp_path / layout.preempted("pretrain", "pixels")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_inside_is_only_noted_and_outside_acts_as_before(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with preemption.deferred() as told:
        assert told() == 0
        signal.raise_signal(number)
        assert told() == number
    assert signal.getsignal(number) is before
    assert preemption.status() == 128 + number


def test_a_second_signal_ends_the_process_at_once() -> None:
    with preemption.deferred():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit) as stop:
            signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 143


def test_a_process_of_torchruns_is_told_twice_and_still_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with preemption.deferred() as told:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert told() == signal.SIGTERM


def test_a_process_that_was_not_told_itself_ends_as_by_sigterm() -> None:
    with preemption.deferred() as told:
        assert told() == 0
    assert preemption.status() == 143


def test_outside_of_the_main_thread_nothing_is_deferred() -> None:
    seen: list[int] = []

    def body() -> None:
        with preemption.deferred() as told:
            seen.append(told())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_preempted_stage_is_one_line_the_signals_status_and_a_marker(
    marker: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def told_to_stop() -> None:
        with stage.running("pretrain"), preemption.deferred() as told:
            signal.raise_signal(number)
            assert told()
            raise PreemptedError("saved at step 7")

    with pytest.raises(SystemExit) as stop:
        told_to_stop()
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == "preempted: saved at step 7\n"
    assert marker.exists()
    assert not list(Path("artifacts/pretrain").iterdir())


def test_a_stage_that_is_told_to_stop_before_it_can_save_is_preempted_too(marker: Path) -> None:
    with pytest.raises(SystemExit) as stop, stage.running("pretrain"):
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 143
    assert marker.exists()


def test_a_failed_stage_leaves_no_marker_not_even_an_old_one(marker: Path) -> None:
    marker.parent.mkdir(parents=True)
    marker.touch()
    with pytest.raises(SystemExit) as stop, stage.running("pretrain"):
        raise DataError("expected images, got none; add some")
    assert stop.value.code == 2
    assert not marker.exists()


def test_a_process_that_torchrun_ends_does_not_count_as_preempted(
    marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with pytest.raises(SystemExit) as stop, stage.running("pretrain"):
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 143
    assert not marker.exists()
