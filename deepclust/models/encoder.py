"""A frozen encoder: images in [0, 1] to features, with everything it needs to be used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepclust import seeding
from deepclust.errors import CheckpointError, ConfigError
from deepclust.models import backbones

WEIGHTS = "encoder.safetensors"
DESCRIPTION = "encoder.json"
HEADER = "deepclust"  # the one key of our files' metadata: with several, safetensors would write them in any order
_OPTIONS = ("backbone", "image_size", "channels", "mean", "std", "stem", "network_channels", "input_size")


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

    Attributes:
        description: These arguments, `auto` and None resolved where they stand for something else.
        feature_dim: Dimension of the features.

    Raises:
        ConfigError: If the images do not fit the network.
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
        self.description: dict[str, Any] = dict(zip(_OPTIONS, values, strict=True))
        self.backbone, self.feature_dim = backbones.build(
            backbone, channels=wanted, image_size=size, stem=stem or "auto"
        )
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (batch, feature_dim) of images (batch, channels, height, width) in [0, 1]."""
        size = self.description["input_size"]
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        # Broadcasting over the statistics' channels is what repeats a grey channel.
        features: Tensor = self.backbone((images - self.mean) / self.std)
        return features


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
    save_file(
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
    if absent := [key for key in _OPTIONS if key not in description]:
        raise CheckpointError(
            f"the encoder in {folder} is damaged: {DESCRIPTION} lacks {', '.join(absent)}; run its pretrain stage again"
        )
    encoder = Encoder(**{key: description[key] for key in _OPTIONS})
    encoder.description |= {key: description[key] for key in ("ignored",) if key in description}
    try:
        encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {folder} are not those of backbone {description['backbone']!r} "
            f"({' '.join(str(error).split())[:200]}); run its pretrain stage again"
        ) from error
    return encoder.eval().requires_grad_(False)
