"""Backbones are the networks their names promise, and timm's come without a network or a surprise."""

import socket
import subprocess
import sys
from collections.abc import Callable
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


@pytest.mark.parametrize("name", ["small", "medium", "resnet18", "resnet50"])
@pytest.mark.parametrize(("channels", "image_size"), [(1, 28), (3, 72)])
def test_backbones_have_the_dimension_they_say(name: str, channels: int, image_size: int) -> None:
    net, dim = backbones.build(name, channels=channels, image_size=image_size)
    with torch.no_grad():
        assert net.eval()(images(channels, image_size)).shape == (2, dim)


def test_medium_is_small_with_twice_the_channels() -> None:
    small, medium = (
        [tuple(value.shape) for value in build(name).parameters() if value.ndim == 4] for name in ("small", "medium")
    )
    assert medium == [(2 * out, inputs if inputs == 3 else 2 * inputs, *side) for out, inputs, *side in small]


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
    [
        ("auto", 64, (3, 1), False),
        ("auto", 65, (7, 2), True),
        ("small", 96, (3, 1), False),
        ("imagenet", 32, (7, 2), True),
    ],
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
        ("small", "imagenet", r"^stem: expected 'auto', as small has one stem only"),
        ("timm/test_vit", "small", r"^stem: expected 'auto', as timm/test_vit has one stem only"),
    ],
)
def test_an_unknown_backbone_or_stem_is_refused_with_the_known_ones(name: str, stem: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        backbones.build(name, channels=3, image_size=32, stem=stem)


def test_resnets_do_not_start_as_their_shortcuts_unless_asked_to() -> None:
    net: Any = build("resnet18")
    assert all((block.bn2.weight == 1).all() for block in net.layer1)


@pytest.mark.parametrize(
    ("name", "count"),
    [("small", 3), ("resnet18", 8), ("resnet50", 16), ("timm/resnet18", 8), ("pixels", 0), ("timm/test_vit", 0)],
)
def test_the_last_norm_of_every_residual_block_is_zeroed_and_counted(name: str, count: int) -> None:
    net = build(name)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm zeroes its own when it builds
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert backbones.zero_init_residual(net) == count
    changed = [value for key, value in net.state_dict().items() if not torch.equal(value, before[key])]
    assert len(changed) == count
    assert all((value == 0).all() for value in changed)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_zeroed_norms_are_those_that_torchvision_would_zero(name: str) -> None:
    net = build(name)
    backbones.zero_init_residual(net)
    expected = getattr(models, name)(zero_init_residual=True).state_dict()
    zeroed = {key for key, value in net.state_dict().items() if key.endswith("weight") and (value == 0).all()}
    assert zeroed == {key for key, value in expected.items() if key.endswith("weight") and (value == 0).all()}


@pytest.mark.parametrize(
    ("name", "find"),
    [("small", lambda net: net[3]), ("resnet18", lambda net: net.layer1[1]), ("resnet50", lambda net: net.layer1[1])],
)
def test_a_zeroed_block_is_the_identity_and_its_relu(name: str, find: Callable[[Any], nn.Module]) -> None:
    net = build(name)
    backbones.zero_init_residual(net)
    block = find(net)
    inputs = torch.randn(
        2, next(block.parameters()).shape[1], 8, 8, generator=seeding.generator("block"), requires_grad=True
    )
    torch.testing.assert_close(block.train()(inputs), inputs.relu(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_resnet.r160_in1k", {}),
        ("test_convnext", {}),
        ("test_vit", {"img_size": 32}),
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


def test_a_transformer_also_takes_crops_of_another_size() -> None:
    net = build("timm/vit_tiny_patch16_224")
    with torch.no_grad():
        assert net(images(size=48)).shape == net(images(size=32)).shape


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


def test_without_timm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"begin with timm/ need timm.*pip install timm"):
        build("timm/resnet18")


def test_timm_is_imported_for_its_own_models_only() -> None:
    code = (
        "import sys; from deepclust.models import backbones, encoder; "
        "backbones.build('resnet18', channels=3, image_size=32);"
        "sys.exit('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_published_weights_pass_through_timms_own_fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    published = timm.create_model("test_vit").state_dict()
    asked = []

    def fetch(*place: str) -> dict[str, torch.Tensor]:
        asked.append(place)
        return dict(published)

    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", fetch)
    found = backbones.download("timm/test_vit.r160_in1k", image_size=160)
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    assert found.keys() == published.keys()
    assert all(torch.equal(value, found[name]) for name, value in published.items())
    assert (
        backbones.download("timm/test_vit.r160_in1k", image_size=32)["pos_embed"].shape[1] < found["pos_embed"].shape[1]
    )


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_vit4"])
def test_weights_that_are_not_published_are_refused_with_those_that_are(name: str) -> None:
    known = "timm/test_vit.r160_in1k" if name == "timm/test_vit" else "-"
    with pytest.raises(ConfigError, match=rf"expected timm/NAME.TAG with published weights.*known: {known}$"):
        backbones.download(name, image_size=32)


def test_without_a_network_the_remedy_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*place: str) -> None:
        raise OSError("no route\nto the host")

    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", fetch)
    with pytest.raises(CheckpointError, match=r"can not fetch .* \(no route to the host\); .*put the safetensors file"):
        backbones.download("timm/test_vit.r160_in1k", image_size=32)


def test_crops_that_a_backbone_can_not_take_are_refused_before_any_work_and_change_nothing() -> None:
    backbone, _ = backbones.build("timm/vit_tiny_patch16_224", channels=1, image_size=64)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbones.check_crops(backbone, [64, 32], channels=1)
    with pytest.raises(
        ConfigError, match=r"^crops\.1\.size: the backbone can not take crops of 51 pixels \(.*\); choose"
    ):
        backbones.check_crops(backbone, [64, 51], channels=1)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
