"""An encoder comes back as it was saved, or not at all; weights of a file are taken whole."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models

from deepclust import seeding
from deepclust.errors import CheckpointError, ConfigError
from deepclust.methods.pretrained import Config, pretrained
from deepclust.models import encoder

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def fresh(backbone: str = "small", stem: str = "auto") -> encoder.Encoder:
    with seeding.seeded(0):
        return encoder.Encoder(backbone=backbone, image_size=32, channels=1, mean=[0.3], std=[0.2], stem=stem).eval()


def batch(channels: int, size: int = 32) -> Tensor:
    return torch.rand(3, channels, size, size, generator=seeding.generator("batch"))


def test_a_saved_encoder_embeds_as_before_and_its_file_is_the_same_each_time(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    first = fresh()
    assert torch.equal(torch.random.get_rng_state(), state), "weights from a seed leave the global generator alone"
    found = []
    for _ in range(3):
        encoder.save(fresh(), tmp_path, method="random")
        found.append((tmp_path / encoder.WEIGHTS).read_bytes())
    assert found[0] == found[1] == found[2]
    again = encoder.load(tmp_path)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(again(batch(1)), first(batch(1)))


@pytest.mark.parametrize("damage", ["missing weights", "truncated", "partial", "old description"])
def test_damaged_encoders_are_refused(tmp_path: Path, damage: str) -> None:
    encoder.save(fresh(), tmp_path)
    weights, description = tmp_path / encoder.WEIGHTS, tmp_path / encoder.DESCRIPTION
    values = json.loads(description.read_text())
    if damage == "missing weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "old description":
        del values["stem"]
        description.write_text(json.dumps(values))
    else:
        save_file({k: v for k, v in load_file(weights).items() if "norm2" not in k}, weights)
    with pytest.raises(CheckpointError, match="pretrain stage"):
        encoder.load(tmp_path)


def original(name: str, **options: Any) -> nn.Module:
    """A classifier of torchvision or timm with weights and statistics unlike any fresh one."""
    with seeding.seeded(1):
        net = timm.create_model(name.removeprefix("timm/"), **options) if "/" in name else getattr(models, name)()
        for parameter in net.parameters():
            nn.init.kaiming_normal_(parameter) if parameter.ndim > 1 else nn.init.uniform_(parameter, 0.5, 1.5)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    result: nn.Module = net.eval()
    return result


def write(folder: Path, tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """A file of weights, and the parameters that name it."""
    path = folder / "weights.safetensors"
    save_file({prefix + name: value.contiguous() for name, value in tensors.items()}, path)
    return named(path)


def named(path: Path) -> dict[str, Any]:
    return {"weights": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def taken(file: dict[str, Any], **changes: Any) -> encoder.Encoder:
    """The encoder with a file's weights: resnet18 for colour images of 32 pixels where nothing else is said."""
    options = {"backbone": "resnet18", "image_size": 32, "channels": 3} | file | changes
    data = {name: options.pop(name) for name in ("image_size", "channels")}
    return pretrained(Config(**options), **data)


def truth(net: Any, pictures: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """A classifier's features of normalised pictures, without its head."""
    if hasattr(net, "reset_classifier"):
        net.reset_classifier(0)
    else:
        net.fc = nn.Identity()
    with torch.no_grad():
        features: Tensor = net((pictures - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1))
    return features


HALF = [0.5] * 3


@pytest.mark.parametrize(
    ("name", "mean", "std", "ignored", "prefix"),
    [
        ("resnet18", MEAN, STD, ["fc.bias", "fc.weight"], "module.backbone."),
        ("timm/test_resnet.r160_in1k", HALF, HALF, ["fc.bias", "fc.weight"], "module."),
        ("timm/test_vit", HALF, HALF, ["head.bias", "head.weight"], ""),
        ("timm/test_convnext", HALF, HALF, ["head.fc.bias", "head.fc.weight"], ""),  # head.norm is no classifier
    ],
)
def test_given_weights_give_their_own_networks_features(
    tmp_path: Path, name: str, mean: list[float], std: list[float], ignored: list[str], prefix: str
) -> None:
    net = original(name, **({"img_size": 32} if "vit" in name else {}))
    found = taken(write(tmp_path, net.state_dict(), prefix), backbone=name)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert found.description["ignored"] == ignored
    assert (found.description["mean"], found.description["std"]) == (mean, std)
    torch.testing.assert_close(found(batch(3)), truth(net, batch(3), mean, std), rtol=1e-5, atol=1e-5)


def test_a_grey_image_is_repeated_for_a_network_of_three_channels(tmp_path: Path) -> None:
    file = write(tmp_path, original("resnet18").state_dict())
    grey, colour = (taken(file, image_size=28, channels=channels, input_size=48) for channels in (1, 3))
    assert (grey.description["channels"], grey.description["network_channels"]) == (1, 3)
    pictures = batch(1, 28)
    torch.testing.assert_close(grey(pictures), colour(torch.cat([pictures] * 3, dim=1)), rtol=1e-6, atol=1e-6)


def test_images_are_brought_to_the_size_that_the_network_gets_and_an_encoder_keeps_it(tmp_path: Path) -> None:
    net = original("timm/test_vit", img_size=48)
    found = taken(write(tmp_path, net.state_dict()), backbone="timm/test_vit", image_size=28, input_size=48)
    encoder.save(found, tmp_path, method="pretrained")
    again = encoder.load(tmp_path)
    assert again.description == found.description
    for size in (28, 60, 48):
        pictures = batch(3, size)
        resized = F.interpolate(pictures, (48, 48), mode="bilinear", antialias=True) if size != 48 else pictures
        torch.testing.assert_close(found(pictures), truth(net, resized, HALF, HALF), rtol=1e-5, atol=1e-5)
        assert torch.equal(again(pictures), found(pictures))


@pytest.mark.parametrize(("image_size", "stem"), [(28, "imagenet"), (96, "small")])
def test_the_stem_is_that_of_the_weights_whatever_the_images(tmp_path: Path, image_size: int, stem: str) -> None:
    net: Any = original("resnet18")
    net.fc = nn.Identity()
    if stem == "small":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    found = taken(write(tmp_path, net.state_dict()), image_size=image_size)
    assert (found.description["stem"], found.description["ignored"]) == (stem, [])
    expected = truth(net, batch(3, image_size), MEAN, STD)
    torch.testing.assert_close(found(batch(3, image_size)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backbone", "stem"), [("resnet18", "imagenet"), ("timm/test_vit", "auto")])
def test_an_encoder_saved_here_is_taken_with_its_own_normalisation(tmp_path: Path, backbone: str, stem: str) -> None:
    first = fresh(backbone, stem)
    encoder.save(first, tmp_path)
    second = taken(named(tmp_path / encoder.WEIGHTS), backbone=backbone, channels=1)
    assert second.description == first.description | {"ignored": []}
    assert torch.equal(second(batch(1)), first(batch(1)))


def test_stated_statistics_go_before_the_usual_ones_and_a_backbone_of_ours_needs_them(tmp_path: Path) -> None:
    found = taken(write(tmp_path, original("resnet18").state_dict()), mean=[0.1, 0.2, 0.3])
    assert (found.description["mean"], found.description["std"]) == ([0.1, 0.2, 0.3], STD)
    small = {"backbone": "small", "channels": 1} | write(tmp_path, fresh().state_dict())
    with pytest.raises(ConfigError, match="mean, std: expected those that the weights of small were trained with"):
        taken(small)
    assert torch.equal(taken(small, mean=[0.3], std=[0.2])(batch(1)), fresh()(batch(1)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: t.update({"module.bn1.bias": t.pop("bn1.bias")}),
            CheckpointError,
            r"lacks bn1.bias and has the unknown module.bn1.bias",
        ),
        (lambda t: t.update({"bn1.weight": torch.zeros(3)}), CheckpointError, r"bn1.weight of shape \(64,\).*got \(3"),
        (
            lambda t: t.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            ConfigError,
            r"images of 1 channel\(s\), as the network takes, or grey ones; got 3 channels; make the images grey",
        ),
    ],
)
def test_weights_that_are_not_exactly_the_backbones_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], error: type[Exception], message: str
) -> None:
    tensors = dict(original("resnet18").state_dict())
    change(tensors)
    with pytest.raises(error, match=message) as caught:
        taken(write(tmp_path, tensors))
    assert "\n" not in str(caught.value)


TIMM = {"weights": "timm", "sha256": None}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sha256": "0" * 64}, ConfigError, r"^sha256: .*, {sha256}; got 000"),
        ({"weights": "none.safetensors"}, CheckpointError, r"can not read it \(No such file or directory\)"),
        ({"weights": "net.pth"}, ConfigError, r"a .safetensors file or timm, got 'net.pth'; .*save_file\(state"),
        ({"weights": "timm", "backbone": "timm/test_vit"}, ConfigError, r"^sha256: expected null with weights: timm"),
        (TIMM, ConfigError, r"^weights: timm needs a backbone timm/NAME.TAG, got 'r"),
    ],
)
def test_what_is_at_odds_with_the_weights_is_named(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    file = write(tmp_path, original("resnet18").state_dict())
    with pytest.raises(error, match=message.replace("{sha256}", file["sha256"])) as caught:
        taken(file, **options)
    assert "\n" not in str(caught.value)
