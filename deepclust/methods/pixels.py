"""The image itself, flattened, as features: the baseline that any training has to beat."""

from __future__ import annotations

from deepclust import config
from deepclust.models.encoder import Encoder


@config.config
class Config(config.Config):
    """How many pixels."""

    image_size: config.Pixels = 32
    """Side that images are reduced to; smaller ones stay as they are."""


def pixels(*, image_size: int, channels: int) -> Encoder:
    """No network, and no normalisation either.

    Args:
        image_size: Side of the images.
        channels: 1 (grey) or 3 (RGB).
    """
    mean, std = [0.0] * channels, [1.0] * channels
    return Encoder(backbone="pixels", image_size=image_size, channels=channels, mean=mean, std=std)
