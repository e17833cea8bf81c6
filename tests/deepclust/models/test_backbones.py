"""Backbones are the networks their names promise, and timm's come without a network or a surprise."""

import runpy
import socket
import sys
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from deepclust import seeding
from deepclust.errors import CheckpointError, ConfigError
from deepclust.models import backbones


def build(name: str, channels: int = 3, image_size: int = 32, stem: str = "auto") -> nn.Module:
    with seeding.seeded(0):
        return backbones.build(name, channels=channels, image_size=image_size, stem=stem)[0].eval()


def images(channels: int = 3, size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=seeding.generator("images"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_medium_is_small_with_twice_the_channels() -> None:
    small, medium = (
        [tuple(value.shape) for value in build(name).parameters() if value.ndim == 4] for name in ("small", "medium")
    )
    assert medium == [(2 * out, inputs if inputs == 3 else 2 * inputs, *side) for out, inputs, *side in small]
    for name, dim in (("small", 128), ("medium", 256)):
        net, stated = backbones.build(name, channels=1, image_size=28)
        assert net(images(1, 28)).shape == (2, dim) == (2, stated)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_imagenet_stem_is_torchvisions_network(name: str) -> None:
    with seeding.seeded(0):
        original: Any = getattr(models, name)().eval()
        original.fc = nn.Identity()
    found = build(name, stem="imagenet")
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in original.state_dict().items())
    torch.testing.assert_close(found(images()), original(images()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stem", "image_size", "convolution", "pooled"),
    [("auto", 64, (3, 1), False), ("auto", 65, (7, 2), True), ("small", 96, (3, 1), False)],
)
def test_a_resnets_stem_is_the_one_asked_for(
    stem: str, image_size: int, convolution: tuple[int, int], pooled: bool
) -> None:
    net: Any = build("resnet18", 1, image_size, stem)
    assert (net.conv1.kernel_size[0], net.conv1.stride[0], net.conv1.in_channels) == (*convolution, 1)
    assert isinstance(net.maxpool, nn.MaxPool2d) == pooled


@pytest.mark.parametrize(
    ("name", "stem", "error"),
    [
        ("resnet19", "auto", r"^backbone: expected one of pixels, small.*resnet18.*timm/NAME; got 'resnet19'$"),
        ("resnet18", "large", r"^stem: expected one of auto, small, imagenet; got 'large'$"),
        ("timm/test_vit", "small", r"^stem: expected 'auto', as timm/test_vit has one stem only"),
    ],
)
def test_an_unknown_backbone_or_stem_is_refused_with_the_known_ones(name: str, stem: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        backbones.build(name, channels=3, image_size=32, stem=stem)


@pytest.mark.parametrize(
    ("name", "count"),
    [("small", 3), ("resnet18", 8), ("resnet50", 16), ("timm/resnet18", 8), ("pixels", 0), ("timm/test_vit", 0)],
)
def test_the_last_norm_of_every_residual_block_is_zeroed_when_asked_for_and_counted(name: str, count: int) -> None:
    net = build(name)
    if not name.startswith("timm/"):  # timm zeroes its own when it builds
        assert all((value != 0).any() for key, value in net.state_dict().items() if key.endswith("weight"))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert backbones.zero_init_residual(net) == count
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert len(changed) == count
    assert all((net.state_dict()[key] == 0).all() for key in changed)
    if name.startswith("resnet"):
        theirs = getattr(models, name)(zero_init_residual=True).state_dict()
        assert changed == {key for key, value in theirs.items() if key.endswith("weight") and (value == 0).all()}


def test_a_zeroed_block_is_the_identity_and_its_relu() -> None:
    net: Any = build("small")
    backbones.zero_init_residual(net)
    inputs = torch.randn(2, 32, 8, 8, generator=seeding.generator("block"))
    torch.testing.assert_close(net[3].train()(inputs), inputs.relu(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet.r160_in1k", {}),
        ("vit_tiny_patch16_224", {"img_size": 32}),
        ("swin_tiny_patch4_window7_224", {"img_size": 32}),
        ("mobilenetv3_small_050", {}),  # its output is wider than its num_features
    ],
)
@pytest.mark.usefixtures("offline")
def test_a_model_of_timms_is_the_one_that_timm_builds(name: str, options: dict[str, int]) -> None:
    with seeding.seeded(0):
        original = timm.create_model(name, num_classes=0, in_chans=1, **options).eval()
    with seeding.seeded(0):
        net, dim = backbones.build(f"timm/{name}", channels=1, image_size=32)
    assert net.training, "as torchvision's, ready to be trained"
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in original.state_dict().items())
    with torch.no_grad():
        features = net.eval()(images(1))
        torch.testing.assert_close(features, original(images(1)), rtol=0, atol=0)
    assert features.shape == (2, dim)


@pytest.mark.parametrize(
    ("name", "image_size", "error"),
    [
        ("timm/resnet19", 32, r"^backbone: timm \S+ has no model 'resnet19'; the nearest names are .*resnet18"),
        ("timm/hf-hub:someone/model", 32, "has no model 'hf-hub:someone/model'"),
        ("timm/resnet18.other", 32, r"^backbone: timm \S+ has no weights 'other' of resnet18; it knows a1_in1k"),
        ("timm/test_vit", 28, r"test_vit can not take images of shape \(3, 28, 28\) .*divisible.*take images of"),
        ("timm/inception_v4", 32, r"inception_v4 can not take images of shape \(3, 32, 32\) .*[Kk]ernel size"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_what_timm_can_not_build_is_one_clear_line(name: str, image_size: int, error: str) -> None:
    with pytest.raises(ConfigError, match=error) as caught:
        build(name, image_size=image_size)
    assert "\n" not in str(caught.value)


def test_timm_is_imported_for_its_own_models_only_and_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    runpy.run_path(backbones.__file__)["build"]("resnet18", channels=3, image_size=32)
    with pytest.raises(ConfigError, match=r"begin with timm/ need timm.*pip install timm"):
        build("timm/resnet18")


def test_published_weights_pass_through_timms_own_fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    published = timm.create_model("test_vit").state_dict()
    asked = []

    def fetch(*place: str) -> dict[str, torch.Tensor]:
        asked.append(place)
        return dict(published)

    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", fetch)
    found, fitted = (backbones.download("timm/test_vit.r160_in1k", image_size=size) for size in (160, 32))
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")] * 2
    assert found.keys() == published.keys()
    assert all(torch.equal(value, found[name]) for name, value in published.items())
    assert fitted["pos_embed"].shape[1] < found["pos_embed"].shape[1]


def test_weights_that_can_not_be_had_are_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*place: str) -> None:
        raise OSError("no route\nto the host")

    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", fetch)
    for name, known in (("timm/test_vit", "timm/test_vit.r160_in1k"), ("timm/test_vit4", "-")):
        with pytest.raises(ConfigError, match=rf"expected timm/NAME.TAG with published weights.*known: {known}$"):
            backbones.download(name, image_size=32)
    with pytest.raises(CheckpointError, match=r"can not fetch .* \(no route to the host\); .*put the safetensors file"):
        backbones.download("timm/test_vit.r160_in1k", image_size=32)


def test_crops_that_a_backbone_can_not_take_are_refused_before_any_work_and_change_nothing() -> None:
    backbone, _ = backbones.build("timm/vit_tiny_patch16_224", channels=1, image_size=64)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbones.check_crops(backbone, [64, 32], channels=1)
    with torch.no_grad():
        assert backbone(images(1, 64)).shape == backbone(images(1, 32)).shape
    with pytest.raises(
        ConfigError, match=r"^crops\.1\.size: the backbone can not take crops of 51 pixels \(.*\); choose"
    ):
        backbones.check_crops(backbone, [64, 51], channels=1)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
