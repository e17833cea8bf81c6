"""The watchdog in the stage: it warns or stops as params.yaml says, and the last good encoder is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepclust.clustering import kmeans
from deepclust.errors import DataError
from deepclust.evaluation import watchdog
from deepclust.models import encoder as encoders
from deepclust.training import optim
from tasks.shared.operations.observers import probe
from tasks.shared.outputs import layout
from tests.tasks import small_run


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small_run.build(tmp_path, count=48)
    return tmp_path


def _refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoder: str) -> str:
    """The line with which pretraining is refused."""
    with pytest.raises(SystemExit, match="2"):
        small_run.run("pretrain", monkeypatch, encoder)
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_broken_run_goes_on_with_a_warning_or_stops_as_params_say(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, path in enumerate((workspace / "images").rglob("*.png")):  # two pictures: one trains, the other tests
        Image.fromarray(np.full((20, 18, 3), 90 + index % 2, dtype=np.uint8)).save(path)
    small_run.run("prepare", monkeypatch)
    small_run.overrides.apply(["pretrain.watchdog=stop"])
    error = _refusal(monkeypatch, capsys, "simsiam")
    assert error.startswith("error: stopped by the watchdog after epoch 1: constant images: ")
    assert error.endswith("; no epoch was good, so no encoder is kept")
    assert not layout.out("pretrain", "simsiam").exists()
    small_run.overrides.apply(["pretrain.watchdog=warn"])
    small_run.run("pretrain", monkeypatch, "simsiam")
    assert "warning: epoch 1: constant images: " in capsys.readouterr().err
    assert (layout.out("pretrain", "simsiam") / encoders.WEIGHTS).is_file()


def test_after_a_loss_that_is_not_finite_the_last_good_epochs_encoder_is_kept(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_run.run("prepare", monkeypatch)
    set_rate = optim.set_rate

    def spoil(optimiser: torch.optim.Optimizer, schedule: optim.Schedule, step: int) -> float:
        if step == 3:  # in the second epoch of two steps
            optimiser.param_groups[0]["params"][0].data.fill_(float("nan"))
        return set_rate(optimiser, schedule, step)

    monkeypatch.setattr(optim, "set_rate", spoil)
    error = _refusal(monkeypatch, capsys, "simsiam")
    folder = layout.last_good("simsiam")
    assert "expected a finite loss" in error
    assert error.endswith(f"; the encoder after epoch 1 is kept in {folder}")
    assert all(torch.isfinite(weight).all() for weight in encoders.load(folder).parameters())


def test_features_that_are_not_finite_are_named_and_not_probed_and_the_run_goes_on(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: probe.Probe) -> float:
        raise DataError("probed features that are not finite")

    monkeypatch.setattr(watchdog.Watchdog, "_of_features", lambda self: {"non_finite_features": 1.0})
    monkeypatch.setattr(probe.Probe, "_accuracy", refuse)
    small_run.run("prepare", monkeypatch)
    small_run.run("pretrain", monkeypatch, "simsiam")
    assert "warning: epoch 1: non-finite: " in capsys.readouterr().err
    assert not layout.last_good("simsiam").exists(), "the run has ended well"


def test_an_e_step_that_meets_diverged_features_names_the_remedy_and_the_kept_encoder(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverged(*_: object, **__: object) -> None:
        raise DataError("expected finite points to cluster")

    monkeypatch.setattr(kmeans, "fit", diverged)
    small_run.run("prepare", monkeypatch)
    error = _refusal(monkeypatch, capsys, "pcl")
    assert error.startswith("error: before epoch 1: expected finite points to cluster; lower optimiser.rate")
    assert error.endswith(f"; the encoder after epoch 1 is kept in {layout.last_good('pcl')}")
