"""Features of a transformer's tokens are what timm's own pooling gives with the same weights."""

import json

import pytest
import timm
import torch
from torch import nn

from deepclust import seeding
from deepclust.adaptation import Classifier, Tent
from deepclust.errors import ConfigError
from deepclust.models import encoder

MEAN, STD = [0.2, 0.4, 0.6], [0.3, 0.2, 0.1]
SIDE = 112  # of patches of 14 and of 16


def made(name, pooling):
    options = {"image_size": SIDE, "channels": 3, "mean": MEAN, "std": STD, "pooling": pooling}
    found = encoder.Encoder(backbone=f"timm/{name}", **options).eval()
    with seeding.seeded(1):
        for parameter in found.parameters():
            nn.init.normal_(parameter, std=0.5)
    return found


def images():
    return torch.rand(3, 3, SIDE, SIDE, generator=seeding.generator("images"))


def timms(found, name, **options):
    """timm's network with the same weights and its own pooling, on normalised images."""
    net = timm.create_model(name, img_size=SIDE, num_classes=0, **options).eval()
    net.load_state_dict(found.backbone.state_dict(), strict=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return net((images() - mean) / std)


@pytest.mark.parametrize(("pooling", "theirs"), [("cls", "token"), ("mean", "avg")])
@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("test_vit", {"fc_norm": False}),
        ("vit_small_patch16_dinov3", {"use_fc_norm": False}),  # with registers
        ("eva02_tiny_patch14_224", {"use_fc_norm": True}),  # its norm stands behind the pooling
    ],
)
def test_class_token_and_mean_of_patches_are_those_of_timm(name, norms, pooling, theirs):
    found = made(name, pooling)
    expected = timms(found, name, global_pool=theirs, **norms)
    torch.testing.assert_close(found(images()), expected)
    assert found.feature_dim == expected.shape[1]


@pytest.mark.parametrize("name", ["test_vit2", "test_vit4"])  # the first has a register
def test_a_network_without_class_token_has_the_mean_of_its_patches_only(name):
    found = made(name, "mean")
    torch.testing.assert_close(found(images()), timms(found, name, global_pool="avg"))
    for pooling in ("cls", "cls+mean"):
        with pytest.raises(ConfigError, match=rf"^pooling: expected auto or mean, as timm/{name} has no class token; "):
            made(name, pooling)


def test_both_are_one_behind_the_other():
    both, cls, mean = (made("test_vit", pooling) for pooling in ("cls+mean", "cls", "mean"))
    torch.testing.assert_close(both(images()), torch.cat([cls(images()), mean(images())], dim=1))
    assert both.feature_dim == cls.feature_dim + mean.feature_dim
    assert not torch.allclose(cls(images()), mean(images()))


@pytest.mark.parametrize("name", ["resnet18", "small", "timm/convnext_atto"])
def test_a_network_without_tokens_has_only_its_own(name):
    with pytest.raises(ConfigError, match=rf"^pooling: expected auto, as {name} is no transformer .*; got 'mean'$"):
        encoder.Encoder(backbone=name, image_size=32, channels=3, mean=MEAN, std=STD, pooling="mean")


def test_a_saved_encoder_keeps_its_pooling_and_one_that_says_nothing_has_the_networks_own(tmp_path):
    found = made("test_vit", "cls+mean")
    encoder.save(found, tmp_path)
    assert torch.equal(encoder.load(tmp_path)(images()), found(images()))
    own = made("test_vit", "auto")
    encoder.save(own, tmp_path)
    path = tmp_path / encoder.DESCRIPTION
    stated = json.loads(path.read_text())
    assert stated.pop("pooling") == "auto"
    path.write_text(json.dumps(stated))
    assert torch.equal(encoder.load(tmp_path)(images()), own(images()))


def test_a_classifier_on_pooled_tokens_adapts():
    found = made("test_vit", "cls+mean")
    adapter = Tent(Classifier(found, nn.Linear(found.feature_dim, 4)))
    first, second = (adapter(images()) for _ in range(2))
    assert first.shape == (3, 4)
    assert not torch.equal(first, second), "the norms behind both tokens have learnt"
