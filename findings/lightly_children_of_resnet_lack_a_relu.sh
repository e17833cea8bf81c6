#!/usr/bin/env bash
# lightly 1.6.0, torch 2.13.0: a `ResNetGenerator` taken apart by `children()` is another network: the ReLU behind the first norm is missing.
#
# The generator's ResNet applies that ReLU as a function in `forward`, so it is no child. The usual way to a backbone without its classifier,
# `nn.Sequential(*list(net.children())[:-1], nn.AdaptiveAvgPool2d(1))`, keeps all weights, fits every shape and raises nothing.
# torchvision's ResNets, taken apart in the same way, keep their ReLU, which is a module there.
# Expected: the features that the network itself gives to its last layer.
# Seen: features of ResNet-18 differ by 6 % of their length (random weights, in eval mode); with an `nn.ReLU` in the third place by 1e-7.
# So weights trained in the one form give wrong features in the other, and no check of names or shapes finds it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# By uv, which takes torch and torchvision from one index, so that they are of one build.
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" 'lightly==1.6.0' 'torch==2.13.0' 'torchvision==0.28.0'
LIGHTLY_DID_VERSION_CHECK=True "$folder/venv/bin/python" - <<'PYTHON'
import torch
import torchvision
from lightly.models import ResNetGenerator
from torch import nn

torch.manual_seed(0)
images = torch.rand(4, 3, 32, 32)


def own(net: nn.Module, last: nn.Linear) -> torch.Tensor:
    """What the network gives to its last layer."""
    seen: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(images)
    return seen[0]


def taken_apart(net: nn.Module, *, relu: bool = False) -> torch.Tensor:
    parts = list(net.children())[:-1]
    if relu:
        parts.insert(2, nn.ReLU())
    if not any(isinstance(part, nn.AdaptiveAvgPool2d) for part in parts):
        parts.append(nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*parts)(images).flatten(1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


with torch.no_grad():
    lightlys, torchvisions = ResNetGenerator("resnet-18").eval(), torchvision.models.resnet18(weights=None).eval()
    features = own(lightlys, lightlys.linear)
    differences = {
        "as it is": relative(taken_apart(lightlys), features),
        "with a ReLU": relative(taken_apart(lightlys, relu=True), features),
        "torchvision": relative(taken_apart(torchvisions), own(torchvisions, torchvisions.fc)),
    }
print(differences)
assert 0.02 < differences["as it is"] < 0.2
assert differences["with a ReLU"] < 1e-5
assert differences["torchvision"] < 1e-5
PYTHON
echo "as described: a ResNetGenerator taken apart by children() lacks a ReLU"
