"""What an image costs, against sums by hand."""

import pytest
import torch
from torch import nn

from deepclust.models import backbones, cost
from deepclust.models.encoder import Encoder


def test_multiply_adds_and_elements_are_those_by_hand_and_views_are_free():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    found = cost.of(net, (3, 6, 6))
    assert found.macs == 8 * 36 * 3 * 9 + 8 * 36 * 5
    assert found.elements == 108 + 2 * 8 * 36 + 5, "the image, the convolution, its activation, and the linear layer"
    depthwise = cost.of(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), (8, 6, 6))
    assert depthwise.macs == 8 * 36 * 9


def test_it_depends_on_the_network_and_the_image_alone_and_changes_nothing():
    def encoder(seed, **options):
        torch.manual_seed(seed)
        return Encoder(backbone="small", channels=1, mean=[0.5], std=[0.3], **options)

    one = encoder(0, image_size=28)
    before = {name: value.clone() for name, value in one.train().state_dict().items()}
    assert cost.of(one, (1, 28, 28)) == cost.of(encoder(1, image_size=28), (1, 28, 28))
    assert one.training
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    enlarged = cost.of(encoder(0, image_size=28, input_size=56), (1, 28, 28))
    assert enlarged.macs == cost.of(encoder(0, image_size=56), (1, 56, 56)).macs


@pytest.mark.parametrize(
    ("name", "channels", "size", "milliseconds"),
    [
        ("small", 1, 28, 0.255),
        ("resnet18", 3, 64, 51.4),
        ("resnet50", 3, 224, 131.1),
        ("timm/tf_efficientnet_lite0", 3, 160, 18.6),
        ("timm/vit_tiny_patch16_224", 3, 224, 39.3),
    ],
)
def test_seconds_are_within_a_third_of_what_the_reference_core_took(name, channels, size, milliseconds):
    net, _ = backbones.build(name, channels=channels, image_size=size)
    found = cost.of(net, (channels, size, size)).seconds(128) * 1000
    assert milliseconds / 1.34 < found < milliseconds * 1.34


def test_pixels_cost_next_to_nothing_and_small_batches_more():
    net, _ = backbones.build("pixels", channels=3, image_size=64)
    assert cost.of(net, (3, 64, 64)).seconds(128) < 1e-4
    net, _ = backbones.build("small", channels=1, image_size=28)
    found = cost.of(net, (1, 28, 28))
    assert found.seconds(1) > 1.5 * found.seconds(128)
