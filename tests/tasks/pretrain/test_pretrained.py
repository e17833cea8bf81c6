"""A frozen encoder with weights of a file goes through every stage like the others."""

from __future__ import annotations

import csv
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from deepclust.models import encoder as encoders
from tasks.shared.outputs import layout, prepared
from tests.tasks import small_run


def test_weights_of_a_file_run_through_to_the_report_and_another_hash_is_refused_with_the_right_one(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (layout.out("pretrain", "swav") / encoders.WEIGHTS).read_bytes()
    sha256 = hashlib.sha256(weights).hexdigest()
    Path("weights.safetensors").write_bytes(weights)
    edits = ["encoders=[swav, pretrained]", "pretrain.pretrained.weights=weights.safetensors"]
    small_run.overrides.apply([*edits, f"pretrain.pretrained.sha256='{'0' * 64}'"])
    with pytest.raises(SystemExit, match="2"):
        small_run.run("sizes", monkeypatch)  # before anything is decoded
    assert sha256 in capsys.readouterr().err.strip().splitlines()[-1]
    assert not layout.out("pretrain", "pretrained").exists()
    small_run.overrides.apply([f"pretrain.pretrained.sha256='{sha256}'"])
    small_run.run("prepare", monkeypatch)
    for stage in ("pretrain", "embed", "cluster", "linear", "adapt"):
        small_run.run(stage, monkeypatch, "pretrained")
    small_run.run("report", monkeypatch)
    own, original = (np.load(layout.embeddings(encoder, "test")) for encoder in ("pretrained", "swav"))
    np.testing.assert_allclose(own, original, atol=1e-6)
    with layout.COMPARISON.open() as file:
        assert {row["encoder"] for row in csv.DictReader(file)} == {"swav", "pretrained"}


def test_it_is_said_that_grey_images_are_repeated_and_small_ones_enlarged(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_run.overrides.apply(["encoders=[pretrained]"])
    grey = prepared.statistics("swav") | {"channels": 1}
    monkeypatch.setattr(prepared, "statistics", lambda *encoder: grey)
    small_run.run("pretrain", monkeypatch, "pretrained")
    said = capsys.readouterr()
    assert "pretrained: grey images are repeated for the network's 3 channels\n" in said.out
    assert "warning: pretrained: its weights were made for 160 px, the images hold 16: enlarged\n" in said.err


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (
            "{weights: efficientnet_lite0, pooling: cls}",
            "pooling: expected auto, as timm/tf_efficientnet_lite0 is no tr",
        ),
        (
            "{weights: timm, backbone: timm/vit_tiny_patch16_224.augreg_in21k, image_size: 100}",
            "backbone: timm/vit_tiny",
        ),
        ("{weights: timm, backbone: timm/vit_tinny_patch16_224.augreg_in21k}", "backbone: timm .* has no model"),
        ("{weights: nowhere.safetensors, backbone: resnet18}", "expected weights in 'nowhere.safetensors', found none"),
    ],
)
def test_what_weights_can_not_do_is_said_of_their_encoder_before_anything_is_decoded(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], edit: str, line: str
) -> None:
    small_run.overrides.apply(["encoders.other=pretrained", f"pretrain.other={edit}"])
    with pytest.raises(SystemExit, match="2"):
        small_run.run("sizes", monkeypatch)
    (said,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: pretrain.other: {line}", said)
