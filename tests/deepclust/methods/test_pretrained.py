"""Weights from elsewhere are taken whole and used as they were made, or are refused in one line."""

import hashlib
import json
import os

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.transforms import Normalize

from deepclust import seeding
from deepclust.errors import CheckpointError, ConfigError
from deepclust.methods.pretrained import Config, enlarged, pretrained, repeated, wanted_size
from deepclust.models import encoder
from tests.deepclust.models.test_encoder import batch, fresh

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def original(name, **options):
    """A classifier of torchvision or timm with weights and statistics unlike any fresh one."""
    with seeding.seeded(1):
        net = timm.create_model(name.removeprefix("timm/"), **options) if "/" in name else getattr(models, name)()
        for parameter in net.parameters():
            nn.init.kaiming_normal_(parameter) if parameter.ndim > 1 else nn.init.uniform_(parameter, 0.5, 1.5)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def write(folder, tensors, prefix=""):
    """A file of weights, and the parameters that name it."""
    path = folder / "weights.safetensors"
    save_file({prefix + name: value.contiguous() for name, value in tensors.items()}, path)
    return named(path)


def named(path):
    return {"weights": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def taken(file, **changes):
    """The encoder with a file's weights: resnet18 for colour images of 32 pixels, as they are, if nothing else is said.

    `image_size` is the images', `network_size` the option `image_size`.
    """
    options = {"backbone": "resnet18", "image_size": 32, "channels": 3} | file | changes
    data = {name: options.pop(name) for name in ("image_size", "channels")}
    options["image_size"] = options.pop("network_size", data["image_size"])
    return pretrained(Config(**options), **data)


def truth(net, pictures, mean, std):
    """A classifier's features of normalised pictures, without its head."""
    if hasattr(net, "reset_classifier"):
        net.reset_classifier(0)
    else:
        net.fc = nn.Identity()
    return net(Normalize(mean, std)(pictures)).detach()


def headed(folder, tensors, **header):
    """A file of weights with a header, and the parameters that name it."""
    path = folder / "weights.safetensors"
    save_file(dict(tensors), path, metadata={encoder.HEADER: json.dumps(header)})
    return named(path)


def test_a_header_that_is_none_of_ours_is_refused(tmp_path):
    file = headed(tmp_path, {"conv1.weight": torch.zeros(1)}, mean=[2])
    with pytest.raises(CheckpointError, match=r"weights.safetensors are damaged \(mean.0: expected less than or eq"):
        taken(file)


def test_a_file_with_a_header_needs_no_backbone_and_what_the_header_leaves_out_is_as_usual(tmp_path):
    tensors = original("resnet18").state_dict()
    stated = {"backbone": "resnet18", "mean": HALF, "input_size": 64}
    first = taken(headed(tmp_path, tensors, **stated), backbone="auto", network_size="auto")
    assert {key: first.description[key] for key in stated} == stated
    assert first.description["std"] == STD
    second = taken(headed(tmp_path, tensors, backbone="resnet18"), backbone="auto", network_size="auto")
    assert (second.description["mean"], second.description["input_size"]) == (MEAN, 224)
    with pytest.raises(ConfigError, match=r"^backbone: .* does not say which network its weights are of; state it: re"):
        taken(headed(tmp_path, tensors), backbone="auto")


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"weights": "efficientnet_lite0"}, 160),
        ({"weights": "efficientnet_lite0", "image_size": 96}, 96),
        ({"weights": "timm", "backbone": "timm/test_vit.r160_in1k"}, 160),
        ({"weights": "timm", "backbone": "timm/vit_small_patch14_dinov2.lvd142m"}, 518),
    ],
)
def test_the_network_gets_the_size_that_its_weights_were_made_for_or_the_stated_one(options, size):
    assert wanted_size(Config(**options)) == size


def test_without_a_header_a_resnets_stem_tells_the_size_and_timm_that_of_its_own(tmp_path):
    def wanted(tensors, backbone):
        return wanted_size(Config(backbone=backbone, **write(tmp_path, tensors, "module.")))

    imagenet = original("resnet18").state_dict()
    assert wanted(imagenet, "resnet18") == 224
    assert wanted(imagenet | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, "resnet18") == 32
    assert wanted(fresh().state_dict(), "small") == 32
    assert wanted(original("timm/test_vit").state_dict(), "timm/test_vit") == 160


def test_it_is_said_when_grey_is_repeated_and_when_images_are_enlarged(tmp_path):
    file = write(tmp_path, original("resnet18").state_dict())

    def lines(image_size, channels, network_size):
        options = Config(backbone="resnet18", image_size=network_size, **file)
        found = pretrained(options, image_size=image_size, channels=channels)
        return repeated(found), enlarged(options, found)

    assert lines(64, 1, "auto") == (
        "grey images are repeated for the network's 3 channels",
        "its weights were made for 224 px, the images hold 64: enlarged",
    )
    assert lines(64, 3, 96) == (None, "its image_size is 96 px, the images hold 64: enlarged")
    assert lines(64, 3, 64) == lines(64, 3, 32) == (None, None)


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
def test_given_weights_give_their_own_networks_features(tmp_path, name, mean, std, ignored, prefix):
    net = original(name, **({"img_size": 32} if "vit" in name else {}))
    found = taken(write(tmp_path, net.state_dict(), prefix), backbone=name)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert found.description["ignored"] == ignored
    assert (found.description["mean"], found.description["std"]) == (mean, std)
    torch.testing.assert_close(found(batch(3)), truth(net, batch(3), mean, std), rtol=1e-5, atol=1e-5)


def test_a_grey_image_is_repeated_for_a_network_of_three_channels(tmp_path):
    file = write(tmp_path, original("resnet18").state_dict())
    grey, colour = (taken(file, image_size=28, channels=channels, network_size=48) for channels in (1, 3))
    assert (grey.description["channels"], grey.description["network_channels"]) == (1, 3)
    pictures = batch(1, 28)
    torch.testing.assert_close(grey(pictures), colour(torch.cat([pictures] * 3, dim=1)), rtol=1e-6, atol=1e-6)


def test_images_are_brought_to_the_size_that_the_network_gets_and_an_encoder_keeps_it(tmp_path):
    net = original("timm/test_vit", img_size=48)
    found = taken(write(tmp_path, net.state_dict()), backbone="timm/test_vit", image_size=28, network_size=48)
    encoder.save(found, tmp_path, method="pretrained")
    again = encoder.load(tmp_path)
    assert again.description == found.description
    for size in (28, 60, 48):
        pictures = batch(3, size)
        resized = F.interpolate(pictures, (48, 48), mode="bilinear", antialias=True) if size != 48 else pictures
        torch.testing.assert_close(found(pictures), truth(net, resized, HALF, HALF), rtol=1e-5, atol=1e-5)
        assert torch.equal(again(pictures), found(pictures))


@pytest.mark.parametrize(("image_size", "stem"), [(28, "imagenet"), (96, "small")])
def test_the_stem_is_that_of_the_weights_whatever_the_images(tmp_path, image_size, stem):
    net = original("resnet18")
    net.fc = nn.Identity()
    if stem == "small":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    found = taken(write(tmp_path, net.state_dict()), image_size=image_size)
    assert (found.description["stem"], found.description["ignored"]) == (stem, [])
    expected = truth(net, batch(3, image_size), MEAN, STD)
    torch.testing.assert_close(found(batch(3, image_size)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backbone", "stem"), [("resnet18", "imagenet"), ("timm/test_vit", "auto")])
def test_an_encoder_saved_here_is_taken_with_its_own_normalisation(tmp_path, backbone, stem):
    first = fresh(backbone, stem)
    encoder.save(first, tmp_path)
    second = taken(named(tmp_path / encoder.WEIGHTS), backbone=backbone, channels=1)
    assert second.description == first.description | {"ignored": []}
    assert torch.equal(second(batch(1)), first(batch(1)))


def test_stated_statistics_go_before_the_usual_ones_and_a_backbone_of_ours_needs_them(tmp_path):
    found = taken(write(tmp_path, original("resnet18").state_dict()), mean=[0.1, 0.2, 0.3])
    assert (found.description["mean"], found.description["std"]) == ([0.1, 0.2, 0.3], STD)
    small = {"backbone": "small", "channels": 1} | write(tmp_path, fresh().state_dict())
    with pytest.raises(ConfigError, match="mean, std: expected those that the weights of small were trained with"):
        taken(small)
    assert torch.equal(taken(small, mean=[0.3], std=[0.2])(batch(1)), fresh()(batch(1)))


def test_nobody_waits_for_weights_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(
        CheckpointError, match=r"^expected weights in '.*/pipe\.safetensors', found no file; mend the path$"
    ):
        taken({"weights": str(tmp_path / "pipe.safetensors"), "sha256": "0" * 64})


RENAMED = {"bn1.bias": None, "module.bn1.bias": torch.ones(64)}


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        (RENAMED, {}, CheckpointError, r"lacks bn1.bias and has the unknown module.bn1.bias; .* tasks\.convert FILE"),
        ({"bn1.weight": torch.zeros(3)}, {}, CheckpointError, r"bn1.weight of shape \(64,\).*got \(3"),
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, {}, ConfigError, r"of 1 channel\(s\), .*; got 3 channels"),
        ({}, {"sha256": "0" * 64}, ConfigError, r"^sha256: .*, {sha256}; got 000"),
        ({}, {"weights": "none.safetensors"}, CheckpointError, r"in 'none.safetensors', found none; mend"),
        ({}, {"weights": "a\0.safetensors"}, CheckpointError, r"found none; mend"),
        ({}, {"weights": "net.pth"}, ConfigError, r"safetensors file, got 'net.pth', .*; `python -m tasks.convert net"),
        ({}, {"weights": "efficientnet"}, ConfigError, r"^weights: expected efficientnet_lite0, timm or .*; did you m"),
        ({}, {"weights": "timm/test_vit"}, ConfigError, r"state `weights: timm, backbone: timm/test_vit`$"),
        ({}, {"weights": "efficientnet_lite0", "sha256": None}, ConfigError, r"^backbone: expected auto with weights"),
        ({}, {"weights": "efficientnet_lite0", "backbone": "auto"}, ConfigError, r"^sha256: expected null with weigh"),
        ({}, {"weights": "timm", "backbone": "timm/test_vit"}, ConfigError, r"^sha256: expected null with weights: t"),
        ({}, {"weights": "timm", "sha256": None}, ConfigError, r"timm needs a backbone timm/NAME.TAG, got 'r"),
    ],
)
def test_weights_that_are_not_exactly_the_backbones_or_at_odds_with_the_options_are_refused(
    tmp_path, changes, options, error, message
):
    tensors = original("resnet18").state_dict() | changes
    file = write(tmp_path, {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(error, match=message.replace("{sha256}", file["sha256"])) as caught:
        taken(file, **options)
    assert "\n" not in str(caught.value)


def test_pooling_is_the_stated_one_else_that_of_the_file(tmp_path):
    file = headed(
        tmp_path, original("timm/test_vit", img_size=32).state_dict(), backbone="timm/test_vit", pooling="mean"
    )
    for stated, kept in (("auto", "mean"), ("cls+mean", "cls+mean")):
        found = taken(file, backbone="auto", pooling=stated)
        assert (found.description["pooling"], found.feature_dim) == (kept, 64 * len(kept.split("+")))
