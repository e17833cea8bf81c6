"""A frozen encoder with weights of a file goes through every stage like the others."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest

from deepclust.models import encoder as encoders
from tasks.shared.outputs import layout
from tests.tasks import small_run


def test_weights_of_a_file_give_their_own_features_and_run_through_to_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small_run.build(tmp_path)
    small_run.run("prepare", monkeypatch)
    small_run.run("pretrain", monkeypatch, "simsiam")
    weights = layout.out("pretrain", "simsiam") / encoders.WEIGHTS
    (tmp_path / "weights.safetensors").write_bytes(weights.read_bytes())
    small_run.overrides.apply(
        [
            "encoders=[simsiam, pretrained]",
            "pretrain.pretrained.backbone=small",
            f"pretrain.pretrained.sha256='{hashlib.sha256(weights.read_bytes()).hexdigest()}'",
        ]
    )
    for encoder in ("simsiam", "pretrained"):
        for stage in ("pretrain", "embed", "cluster", "linear", "adapt"):
            if (stage, encoder) != ("pretrain", "simsiam"):
                small_run.run(stage, monkeypatch, encoder)
    small_run.run("report", monkeypatch)
    own, original = (np.load(layout.embeddings(encoder, "test")) for encoder in ("pretrained", "simsiam"))
    np.testing.assert_allclose(own, original, atol=1e-6)
    with layout.COMPARISON.open() as file:
        assert {row["encoder"] for row in csv.DictReader(file)} == {"simsiam", "pretrained"}


def test_a_file_with_another_hash_is_refused_with_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small_run.build(tmp_path)
    small_run.run("prepare", monkeypatch)
    (tmp_path / "weights.safetensors").write_bytes(b"something")
    small_run.overrides.apply([f"pretrain.pretrained.sha256='{'0' * 64}'"])
    with pytest.raises(SystemExit) as stopped:
        small_run.run("pretrain", monkeypatch, "pretrained")
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert hashlib.sha256(b"something").hexdigest() in error
    assert not layout.out("pretrain", "pretrained").exists()
