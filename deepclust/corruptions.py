"""Corruptions: Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (arXiv 1903.12261).

Strengths of noise, blur, contrast and brightness are those of CIFAR-10-C (the authors' `make_cifar_c.py`, for images of
32×32 pixels). What is different, deliberately:
- the blur's σ is in pixels of a 32-pixel side and grows with the image, so that a severity looks the same at any size;
- images stay floats: the benchmark rounds to 8 bits;
- rotation is not in the benchmark: a fixed angle, to either side by chance, the corners filled by reflection.

Random numbers are drawn image by image from a generator on the CPU, so a stream is the same however it is cut into
batches, and on whatever device it is.

Shapes: B images, C channels (1 or 3), H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from deepclust.errors import ConfigError, DataError

REFERENCE_SIDE = 32


class Corruption(NamedTuple):
    """A corruption and its strength at severities 1 to 5.

    Attributes:
        apply: Function of images, strength and generator; its result may leave [0, 1].
        strengths: One number a severity.
        unit: What the numbers are.
    """

    apply: Callable[[Tensor, float, Generator], Tensor]
    strengths: tuple[float, float, float, float, float]
    unit: str


def corrupt(images: Tensor, name: str, severity: int, *, generator: Generator) -> Tensor:
    """Corrupt every image on its own.

    Args:
        images: (B, C, H, W) in [0, 1], C 1 or 3; not modified.
        name: A key of `CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        generator: A generator on the CPU; advanced by the same amount for every image.

    Returns:
        A new tensor (B, C, H, W) in [0, 1], of the images' type and on their device.

    Raises:
        ConfigError: If the corruption or the severity does not exist.
        DataError: If the images have another shape, type or range.
    """
    if name not in CORRUPTIONS:
        raise ConfigError(f"expected a corruption of {', '.join(CORRUPTIONS)}; got {name!r}")
    if severity not in range(1, 6):
        raise ConfigError(f"expected a severity from 1 to 5, got {severity!r}")
    _check(images)
    if images.numel() == 0:
        return images.clone()
    corruption = CORRUPTIONS[name]
    return corruption.apply(images, corruption.strengths[severity - 1], generator).clamp(0, 1)


def gaussian_noise(images: Tensor, std: float, generator: Generator) -> Tensor:
    """Add independent normal noise to every value."""
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for _ in range(len(images))])
    return images + std * noise.to(images)


def gaussian_blur(images: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Blur with a Gaussian cut at 4σ, edges continued; σ is for a shorter side of 32 pixels."""
    sigma = sigma * min(images.shape[-2:]) / REFERENCE_SIDE
    radius = max(1, math.ceil(4 * sigma))
    weights = [math.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-radius, radius + 1)]
    total = sum(weights)
    height, width = images.shape[-2:]
    # Sums of shifted copies: unlike a convolution's, their bits do not depend on how many images come together.
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    rows = torch.zeros_like(padded[:, :, :height])
    for offset, weight in enumerate(weights):
        rows += padded[:, :, offset : offset + height] * (weight / total)
    blurred = torch.zeros_like(images)
    for offset, weight in enumerate(weights):
        blurred += rows[:, :, :, offset : offset + width] * (weight / total)
    return blurred


def contrast(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Keep a share of each value's distance to its channel's mean over the image."""
    mean = images.double().mean(dim=(2, 3), keepdim=True).to(images)
    return (images - mean) * share + mean


def brightness(images: Tensor, amount: float, generator: Generator) -> Tensor:
    """Add to the value of HSV, hue and saturation kept: channels are scaled alike, and black becomes grey."""
    value = images.amax(dim=1, keepdim=True)
    brighter = (value + amount).clamp(max=1)
    black = value == 0
    return torch.where(black, brighter, images * (brighter / value.masked_fill(black, 1)))


def rotation(images: Tensor, degrees: float, generator: Generator) -> Tensor:
    """Rotate about the centre by the angle, clockwise or counterclockwise with equal chance, bilinearly."""
    signs = torch.stack([torch.randint(2, (), generator=generator) for _ in range(len(images))]) * 2.0 - 1.0
    height, width = images.shape[-2:]
    angle = signs.to(images).view(-1, 1, 1) * math.radians(degrees)
    y = (torch.arange(height).to(images) - (height - 1) / 2).view(1, -1, 1)
    x = (torch.arange(width).to(images) - (width - 1) / 2).view(1, 1, -1)
    # grid_sample wants coordinates in [-1, 1] from edge to edge: half a side is 1.
    source_x = (torch.cos(angle) * x - torch.sin(angle) * y) / (width / 2)
    source_y = (torch.sin(angle) * x + torch.cos(angle) * y) / (height / 2)
    grid = torch.stack([source_x, source_y], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), "standard deviation"),
    "gaussian_blur": Corruption(gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), "σ, pixels of a 32-pixel side"),
    "contrast": Corruption(contrast, (0.75, 0.5, 0.4, 0.3, 0.15), "share of the contrast that is kept"),
    "brightness": Corruption(brightness, (0.05, 0.10, 0.15, 0.20, 0.30), "added to the value of HSV"),
    "rotation": Corruption(rotation, (8.0, 16.0, 24.0, 32.0, 40.0), "degrees"),
}


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"expected images (batch, 1 or 3 channels, height, width), got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise DataError(f"expected images as floats in [0, 1], got {images.dtype}; divide 8-bit images by 255")
    if images.numel() and not (images.amin() >= 0 and images.amax() <= 1):
        raise DataError(
            f"expected images in [0, 1], got values from {images.amin():g} to {images.amax():g}; "
            "corrupt before normalising, and divide 8-bit images by 255"
        )
