"""An encoder comes back as it was saved, or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepclust import backbones, encoder, features, seeding, views
from deepclust.errors import CheckpointError, ConfigError, DataError


def small(backbone: str = "small") -> encoder.Encoder:
    with seeding.seeded(0):
        return encoder.Encoder(backbone=backbone, image_size=16, channels=1, mean=[0.3], std=[0.2]).eval()


def images(count: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)


def embed(net: torch.nn.Module, batch_size: int = 3) -> np.ndarray:
    return features.extract(net, images(), batch_size=batch_size, device=torch.device("cpu"))


def test_a_saved_encoder_embeds_as_before(tmp_path: Path) -> None:
    encoder.save(small(), tmp_path, method="random")
    again = encoder.load(tmp_path)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    np.testing.assert_array_equal(embed(again), embed(small()))


def test_pixels_are_the_normalised_image_row_by_row() -> None:
    found = embed(small("pixels"))
    np.testing.assert_allclose(found, ((images() / 255 - 0.3) / 0.2).reshape(7, -1), rtol=1e-5)


def test_features_keep_their_order_whatever_the_batch() -> None:
    np.testing.assert_allclose(embed(small(), 3), embed(small(), 7), atol=1e-5)


def test_features_that_are_not_finite_name_the_image() -> None:
    def broken(batch: torch.Tensor) -> torch.Tensor:
        return torch.where(
            batch.flatten(1)[:, :2] == views.to_float(torch.from_numpy(images()))[4].flatten()[:2], torch.nan, 1.0
        )

    with pytest.raises(DataError, match="image 4"):
        embed(broken)


@pytest.mark.parametrize(
    "damage", ["missing description", "missing weights", "truncated", "another backbone", "partial"]
)
def test_damaged_encoders_are_refused(tmp_path: Path, damage: str) -> None:
    encoder.save(small(), tmp_path)
    weights, description = tmp_path / encoder.WEIGHTS, tmp_path / encoder.DESCRIPTION
    if damage == "missing description":
        description.unlink()
    elif damage == "missing weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "another backbone":
        description.write_text(description.read_text().replace('"small"', '"resnet18"'))
    else:
        save_file({k: v for k, v in load_file(weights).items() if "norm2" not in k}, weights)
    with pytest.raises(CheckpointError, match="pretrain stage"):
        encoder.load(tmp_path)


def test_an_unknown_backbone_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"small.*resnet18.*got 'resnet19'"):
        backbones.build("resnet19", channels=3, image_size=32)


@pytest.mark.parametrize("name", ["small", "resnet18", "resnet50"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [28, 96])
def test_backbones_have_the_dimension_they_say(name: str, channels: int, image_size: int) -> None:
    net, dim = backbones.build(name, channels=channels, image_size=image_size)
    assert net.eval()(torch.zeros(2, channels, image_size, image_size)).shape == (2, dim)


def test_seeded_initialisation_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first = small().state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, first[name]) for name, value in small().state_dict().items())
