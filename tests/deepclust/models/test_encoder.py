"""An encoder comes back as it was saved, or not at all."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepclust import seeding
from deepclust.errors import CheckpointError
from deepclust.models import encoder, weights


def fresh(backbone="small", stem="auto"):
    with seeding.seeded(0):
        return encoder.Encoder(backbone=backbone, image_size=32, channels=1, mean=[0.3], std=[0.2], stem=stem).eval()


def batch(channels, size=32):
    return torch.rand(3, channels, size, size, generator=seeding.generator("batch"))


def test_a_saved_encoder_embeds_as_before_and_its_file_is_the_same_each_time(tmp_path):
    state = torch.random.get_rng_state()
    first, found = fresh(), []
    assert torch.equal(torch.random.get_rng_state(), state), "weights from a seed leave the global generator alone"
    for _ in range(3):
        encoder.save(fresh(), tmp_path, method="random")
        found.append((tmp_path / encoder.WEIGHTS).read_bytes())
    assert found[0] == found[1] == found[2]
    again = encoder.load(tmp_path)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(again(batch(1)), first(batch(1)))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (encoder.WEIGHTS, lambda path: path.unlink()),
        (encoder.WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:1000])),
        (encoder.WEIGHTS, lambda path: save_file({k: v for k, v in load_file(path).items() if "norm2" not in k}, path)),
        (encoder.WEIGHTS, lambda path: save_file({k: v.to(int) for k, v in load_file(path).items()}, path)),
        (encoder.DESCRIPTION, lambda path: path.write_text(path.read_text().replace("stem", "an older one"))),
    ],
)
def test_damaged_encoders_are_refused(tmp_path, name, damage):
    encoder.save(fresh(), tmp_path)
    damage(tmp_path / name)
    with pytest.raises(CheckpointError, match="pretrain stage"):
        encoder.load(tmp_path)


def test_a_file_of_weights_can_be_read_by_whom_the_umask_lets_read(tmp_path):
    before = os.umask(0o027)
    try:
        weights.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
