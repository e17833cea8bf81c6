"""A file of others becomes one of ours as a whole or not at all, with the command that puts it to use."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision import models

from deepclust.methods import pretrained
from tasks.model import convert
from tasks.shared.operations import params
from tasks.shared.operations.params import overrides
from tests.paths import ROOT

Run = Callable[..., list[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `tasks.convert`; its lines, or if it fails its one line on stderr."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)

    def main(*words: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["convert", *words])
        failed = None
        try:
            convert.main()
        except SystemExit as error:
            failed = error.code
        captured = capsys.readouterr()
        assert (failed, captured.err if failed is None else captured.out) in [(None, ""), (2, "")]
        return (captured.out + captured.err).splitlines()

    return main


def test_the_printed_command_makes_an_encoder_whose_features_are_those_of_the_original(run: Run) -> None:
    original = models.resnet18(num_classes=4).eval()
    state = {f"module.encoder_q.{name}": value for name, value in original.state_dict().items()}
    name = 'it\'s {a}, "moco" #1.pth.tar'
    torch.save({"state_dict": state | {"module.queue": torch.zeros(4, 8)}}, name)
    lines = run(name)
    out = Path(name.replace(".pth.tar", ".safetensors"))
    sha256 = hashlib.sha256(out.read_bytes()).hexdigest()
    assert lines[:5] == [
        "layout: MoCo v1, v2 or PCL, the query encoder",
        "encoder: backbone resnet18, input_size 224, mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]",
        "kept: 120 tensors",
        "left out: encoder_q.fc (2), queue (1)",
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256}",
    ]
    words = shlex.split(lines[5].removeprefix("to use it: "))
    assert words[:3] == ["python", "-m", "tasks.overrides"]
    overrides.apply(words[3:])
    encoder = words[3].removeprefix("encoders.").removesuffix("=pretrained")
    options = params.load().options(encoder)
    assert isinstance(options, pretrained.Config)
    assert (options.weights, options.backbone, options.sha256) == (str(out), "resnet18", sha256)
    found = pretrained.pretrained(options.replaced(image_size=64), image_size=64, channels=3)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    original.fc = torch.nn.Identity()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.inference_mode():
        torch.testing.assert_close(found(images), original((images - mean) / std), rtol=0, atol=1e-6)


def test_a_refused_file_is_one_line_and_leaves_nothing(run: Run) -> None:
    state = models.resnet18().state_dict()
    torch.save(state, "resnet.pth")
    torch.save({"args": argparse.Namespace(), "state_dict": state}, "namespace.pth")
    torch.save(state | {"bn1.bias": state["bn1.bias"] / 0}, "nan.pth")
    Path("there.safetensors").write_bytes(b"mine")
    before = {path.name for path in Path().iterdir()}
    for words, message in [
        (["none.pth"], "error: expected a torch file in none.pth, found none; mend the path"),
        (
            ["namespace.pth"],
            "error: namespace.pth holds more than weights, an object of argparse.Namespace, and is not",
        ),
        (["nan.pth"], "error: expected finite weights, got NaN or infinity in bn1.bias; take another checkpoint"),
        (["there.safetensors"], "error: expected a file of torch.save in there.safetensors, got a damaged one or"),
        (
            ["resnet.pth", "--out", "there.safetensors"],
            "error: expected a new file for --out, there.safetensors is there",
        ),
        (["resnet.pth", "--out", "a.pth"], "error: expected a name that ends in .safetensors for --out, got a.pth"),
        (["resnet.pth", "--backbone", "resnet19"], "error: backbone: expected one of pixels, small"),
        (["resnet.pth", "--backbone", "pixels"], "error: backbone: expected one with weights, got 'pixels'"),
        (
            ["resnet.pth", "--backbone", "resnet50"],
            "error: expected the tensors of backbone resnet50, got weights that",
        ),
    ]:
        lines = run(*words)
        assert len(lines) == 1
        assert lines[0].startswith(message)
        assert {path.name for path in Path().iterdir()} == before
    assert Path("there.safetensors").read_bytes() == b"mine"
    assert run("resnet.pth", "--out", "there.safetensors", "--overwrite")[0] == "layout: torchvision's names"
    assert Path("there.safetensors").stat().st_size > 4e7


def test_an_encoder_never_takes_the_name_of_a_method(run: Run) -> None:
    torch.save(models.resnet18().state_dict(), "swav.pth")
    assert " encoders.swav-weights=pretrained " in run("swav.pth")[-1]


def test_the_command_is_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tasks.convert", str(tmp_path / "none\n.pth")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert r"none\n.pth, found none" in done.stderr
