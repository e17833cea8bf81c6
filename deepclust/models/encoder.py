"""A frozen encoder: images in [0, 1] to features, with everything it needs to be used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import files, seeding
from deepclust.config import Channels, Count, Positive, Share, Side
from deepclust.errors import CheckpointError, ConfigError
from deepclust.models import backbones, weights
from deepclust.models.pooling import Pooling, dimension, pooled

WEIGHTS = "encoder.safetensors"
DESCRIPTION = "encoder.json"
HEADER = "deepclust"  # the one key of our files' metadata: with several, safetensors would write them in any order
_OPTIONS = {
    "backbone": str,
    "image_size": Side,
    "channels": Literal[1, 3],
    "mean": list[Share],
    "std": list[Positive],
    "stem": str | None,
    "network_channels": Channels,
    "input_size": Side | None,
}
_LATER = {"pooling": Pooling}  # encoders of earlier versions lack it
_STATED = _OPTIONS | {"feature_dim": Count}


class Encoder(nn.Module):
    """Resizes and normalises images and applies a backbone.

    Args:
        backbone: Name of the backbone, see `deepclust.models.backbones.build`.
        image_size: Side of the images it was made for, in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: Mean of each channel of the network, in [0, 1].
        std: Standard deviation of each channel of the network, in [0, 1].
        stem: Stem of a ResNet, see `deepclust.models.backbones.build`.
        network_channels: Channels that the network takes; grey images are repeated for all of them. None: `channels`.
        input_size: Side that images are brought to before the network (bilinear, antialiased), in pixels. None: as
            they are.
        pooling: What features are made of a transformer's tokens, see `deepclust.models.pooling`.

    Attributes:
        description: These arguments, `auto` and None resolved where they stand for something else.
        feature_dim: Dimension of the features.

    Raises:
        ConfigError: If the images or the pooling do not fit the network.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        backbone: str,
        image_size: int,
        channels: int,
        mean: list[float],
        std: list[float],
        stem: str | None = "auto",
        network_channels: int | None = None,
        input_size: int | None = None,
        pooling: Pooling = "auto",
    ) -> None:
        super().__init__()
        wanted = network_channels or channels
        if channels not in (1, wanted):
            raise ConfigError(
                f"expected images of {wanted} channel(s), as the network takes, or grey ones; got {channels} channels; "
                "make the images grey or take other weights"
            )
        if len(mean) != wanted or len(std) != wanted:
            raise ConfigError(
                f"expected mean and std of the network's {wanted} channel(s), got {len(mean)} and {len(std)} numbers; "
                "state as many as it has channels"
            )
        size = input_size or image_size
        stem = backbones.resolve_stem(backbone, image_size=size, stem=stem or "auto")
        values = (backbone, image_size, channels, mean, std, stem, wanted, input_size)
        self.description: dict[str, Any] = dict(zip(_OPTIONS, values, strict=True)) | {"pooling": pooling}
        self.backbone, self.feature_dim = backbones.build(
            backbone, channels=wanted, image_size=size, stem=stem or "auto"
        )
        if pooling != "auto":
            self.feature_dim = dimension(self.backbone, backbone, pooling)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (batch, feature_dim) of images (batch, channels, height, width) in [0, 1]."""
        size = self.description["input_size"]
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        # Broadcasting over the statistics' channels is what repeats a grey channel.
        return pooled(self.backbone, (images - self.mean) / self.std, self.description["pooling"])


def untrained(*, seed: int, **options: Any) -> Encoder:
    """An encoder with weights drawn from a seed.

    Args:
        seed: Decides the weights.
        options: See `Encoder`.
    """
    with seeding.seeded(seed, "weights"):
        return Encoder(**options)


def save(encoder: Encoder, folder: Path, **provenance: Any) -> None:
    """Write an encoder as safetensors and JSON into an existing folder."""
    # The description is part of the weights' file too: whoever takes that file alone needs the normalisation.
    weights.save(
        {name: value.contiguous() for name, value in encoder.state_dict().items()},
        folder / WEIGHTS,
        metadata={HEADER: json.dumps(encoder.description)},
    )
    description = encoder.description | {"feature_dim": encoder.feature_dim} | provenance
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> Encoder:
    """Read an encoder, in eval mode and without gradients.

    Raises:
        CheckpointError: If a file is missing or damaged, or the weights are not exactly the backbone's.
    """
    try:
        description = files.record(folder / DESCRIPTION, _STATED, _LATER | {"ignored": list[str]})
        tensors = weights.load(folder / WEIGHTS)
        encoder = Encoder(**{key: description[key] for key in (*_OPTIONS, *_LATER) if key in description})
    except CheckpointError as error:
        raise CheckpointError(f"{error}; run its pretrain stage") from error
    except ConfigError as error:
        raise CheckpointError(f"{folder / DESCRIPTION} is damaged: {error}; run its pretrain stage") from error
    if encoder.feature_dim != description["feature_dim"]:
        raise CheckpointError(
            f"expected features of {encoder.feature_dim} dimensions in {folder / DESCRIPTION}, as backbone "
            f"{description['backbone']!r} gives, got {description['feature_dim']}; run its pretrain stage"
        )
    encoder.description |= {key: description[key] for key in ("ignored",) if key in description}
    try:
        weights.fill(encoder, tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {folder / WEIGHTS} are not those of backbone {description['backbone']!r} "
            f"({' '.join(str(error).split())[:200]}); run its pretrain stage"
        ) from error
    return encoder.eval().requires_grad_(False)
