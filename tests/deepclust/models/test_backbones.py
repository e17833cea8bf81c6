"""Backbones are the networks their names promise, and timm's come without a network or a surprise."""

import runpy
import socket
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from deepclust import seeding
from deepclust.errors import ConfigError
from deepclust.models import backbones, hub


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.delattr(socket, "getaddrinfo")


def build(name, channels=3, image_size=32, stem="auto"):
    with seeding.seeded(0):
        return backbones.build(name, channels=channels, image_size=image_size, stem=stem)[0].eval()


def images(channels=3, size=32):
    return torch.rand(2, channels, size, size, generator=seeding.generator("images"))


def same_weights(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, state[key]) for key, value in other.items())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_imagenet_stem_is_torchvisions_network_and_goes_with_images_larger_than_64_pixels(name):
    with seeding.seeded(0):
        original = getattr(models, name)().eval()
        original.fc = nn.Identity()
    found = build(name, image_size=65)
    assert same_weights(found.state_dict(), original.state_dict())
    torch.testing.assert_close(found(images()), original(images()), rtol=0, atol=0)
    found = build(name, 1, image_size=64)
    assert (found.conv1.kernel_size, found.conv1.in_channels) == ((3, 3), 1)
    assert not isinstance(found.maxpool, nn.MaxPool2d)
    assert same_weights(build(name, stem="imagenet").state_dict(), original.state_dict())


@pytest.mark.parametrize(
    ("name", "stem", "error"),
    [
        ("resnet19", "auto", r"^backbone: expected one of pixels, small.*resnet18.*timm/NAME; got 'resnet19'$"),
        ("resnet18", "large", r"^stem: expected one of auto, small, imagenet; got 'large'$"),
        ("timm/resnet18", "small", r"^stem: expected 'auto', as timm/resnet18 has one stem only"),
        ("timm/resnet19", "auto", r"^backbone: timm \S+ has no model 'resnet19'; the nearest names are .*resnet18"),
        ("timm/resnet18.other", "auto", r"^backbone: timm \S+ has no weights 'other' of resnet18; it knows a1_in1k"),
        ("timm/test_vit", "auto", r"test_vit can not take images of shape \(3, 28, 28\) .*divisible.*take images of"),
    ],
)
def test_what_can_not_be_built_is_one_clear_line(name, stem, error):
    with pytest.raises(ConfigError, match=error) as caught:
        build(name, image_size=28, stem=stem)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "count"), [("small", 3), ("resnet18", 8), ("timm/resnet18", 8), ("timm/test_vit", 0)])
def test_the_last_norm_of_every_residual_block_is_zeroed_when_asked_for_and_counted(name, count):
    net = build(name)
    if not name.startswith("timm/"):  # timm zeroes its own when it builds
        assert all((value != 0).any() for key, value in net.state_dict().items() if key.endswith("weight"))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    assert backbones.zero_init_residual(net) == count
    zeroed = {key for key, value in net.state_dict().items() if key.endswith("weight") and (value == 0).all()}
    assert len(zeroed) == count
    if name == "resnet18":
        theirs = models.resnet18(zero_init_residual=True).state_dict()
        assert zeroed == {key for key, value in theirs.items() if key.endswith("weight") and (value == 0).all()}


# The second's output is wider than its num_features.
@pytest.mark.parametrize(("name", "options"), [("test_vit", {"img_size": 32}), ("mobilenetv3_small_050", {})])
def test_a_model_of_timms_is_the_one_that_timm_builds(name, options):
    with seeding.seeded(0):
        original = timm.create_model(name, num_classes=0, in_chans=1, **options).eval()
    with seeding.seeded(0):
        net, dim = backbones.build(f"timm/{name}", channels=1, image_size=32)
    assert same_weights(net.state_dict(), original.state_dict())
    features = net.eval()(images(1))
    torch.testing.assert_close(features, original(images(1)), rtol=0, atol=0)
    assert features.shape == (2, dim)


def test_timm_is_imported_for_its_own_models_only_and_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    runpy.run_path(backbones.__file__)["build"]("resnet18", channels=3, image_size=32)
    with pytest.raises(ConfigError, match=r"begin with timm/ need timm.*pip install timm"):
        build("timm/resnet18")


def test_published_weights_pass_through_timms_own_fitting(monkeypatch, tmp_path):
    published = timm.create_model("test_vit").state_dict()
    save_file(published, tmp_path / "model.safetensors")
    files = {("timm/test_vit.r160_in1k", "model.safetensors"): tmp_path / "model.safetensors"}
    monkeypatch.setattr(hub, "fetch", lambda *place: files[place])
    found, fitted = (backbones.download("timm/test_vit.r160_in1k", image_size=size) for size in (160, 32))
    assert same_weights(found, published)
    assert fitted["pos_embed"].shape[1] < found["pos_embed"].shape[1]


def test_weights_without_a_tag_are_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"timm/NAME.TAG with published weights.*known: timm/test_vit.r160_in1k$"):
        backbones.published("timm/test_vit")


def test_crops_that_a_backbone_can_not_take_are_refused_before_any_work_and_change_nothing():
    backbone, _ = backbones.build("timm/vit_tiny_patch16_224", channels=1, image_size=64)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbones.check_crops(backbone, [64, 32], channels=1)
    with pytest.raises(ConfigError, match=r"^crops\.1\.size: the backbone can not take crops of 51 pixels \(.*\); cho"):
        backbones.check_crops(backbone, [64, 51], channels=1)
    assert backbone.training
    assert same_weights(backbone.state_dict(), before)
