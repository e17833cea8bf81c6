"""A frozen encoder: images in [0, 1] to features, with everything it needs to be used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepclust import backbones
from deepclust.errors import CheckpointError

WEIGHTS = "encoder.safetensors"
DESCRIPTION = "encoder.json"


class Encoder(nn.Module):
    """Normalises images and applies a backbone.

    Args:
        backbone: Name of the backbone, see `deepclust.backbones.build`.
        image_size: Side of the images it was made for, in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, backbone: str, image_size: int, channels: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.description: dict[str, Any] = {
            "backbone": backbone,
            "image_size": image_size,
            "channels": channels,
            "mean": mean,
            "std": std,
        }
        self.backbone, self.feature_dim = backbones.build(backbone, channels=channels, image_size=image_size)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (batch, feature_dim) of images (batch, channels, height, width) in [0, 1]."""
        features: Tensor = self.backbone((images - self.mean) / self.std)
        return features


def save(encoder: Encoder, folder: Path, **provenance: Any) -> None:
    """Write an encoder as safetensors and JSON into an existing folder."""
    save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, folder / WEIGHTS)
    description = encoder.description | {"feature_dim": encoder.feature_dim} | provenance
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> Encoder:
    """Read an encoder, in eval mode and without gradients.

    Raises:
        CheckpointError: If a file is missing or damaged, or the weights are not exactly the backbone's.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS) if (folder / WEIGHTS).exists() else None
    except FileNotFoundError as error:
        raise CheckpointError(
            f"expected an encoder in {folder}, found no {DESCRIPTION}; run its pretrain stage"
        ) from error
    except Exception as error:  # safetensors raises its own, undocumented types on damaged files
        raise CheckpointError(f"the encoder in {folder} is damaged ({error}); run its pretrain stage again") from error
    if weights is None:
        raise CheckpointError(f"expected weights in {folder / WEIGHTS}, found none; run its pretrain stage")
    encoder = Encoder(**{key: description[key] for key in ("backbone", "image_size", "channels", "mean", "std")})
    try:
        encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {folder} are not those of backbone {description['backbone']!r} "
            f"({' '.join(str(error).split())[:200]}); run its pretrain stage again"
        ) from error
    return encoder.eval().requires_grad_(False)
