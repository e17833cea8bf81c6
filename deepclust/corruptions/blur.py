"""Blurs. All lengths are pixels of an image whose shorter side is 32 pixels, and grow with it.

Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Generator, Tensor

from deepclust.corruptions import draws
from deepclust.corruptions.filters import enlarged, filtered, magnified, sampled, smooth, streaked


def gaussian_blur(images: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Blur with a Gaussian cut at 4σ, edges continued."""
    return smooth(images, draws.pixels(sigma, images))


def defocus_blur(images: Tensor, radius: float, generator: Generator) -> Tensor:
    """Average over a disc, edges continued."""
    return filtered(images, disc(draws.pixels(radius, images)))


def disc(radius: float) -> list[list[float]]:
    """A kernel that averages over a disc of this radius in pixels, however small, with bilinear values in between."""
    reach = math.floor(radius) + 1
    fine = (np.arange(256) + 0.5) / 128 - 1
    inside = fine[:, None] ** 2 + fine**2 < 1
    tents = np.maximum(0, 1 - np.abs(np.arange(-reach, reach + 1)[:, None] - fine * radius))
    kernel: list[list[float]] = (tents @ inside @ tents.T / inside.sum()).tolist()
    return kernel


def glass_blur(images: Tensor, strength: tuple[float, float], generator: Generator) -> Tensor:
    """Look through frosted glass: each facet, a pixel of a 32-pixel side, shows a place up to `reach` away.

    The strength is σ of the Gaussian blur before and after, and the reach.
    """
    sigma, reach = (draws.pixels(length, images) for length in strength)
    height, width = images.shape[-2:]
    (chance,) = draws.drawn(images, generator, uniform=[(2, height, width)])
    offsets = enlarged((2 * chance - 1) * reach, max(1.0, draws.pixels(1, images)))
    y = torch.arange(height).to(images)[:, None] + offsets[:, 0]
    x = torch.arange(width).to(images) + offsets[:, 1]
    return smooth(sampled(smooth(images, sigma), y, x), sigma)


def motion_blur(images: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Leave a trail at a random angle of at most 45° to the horizontal; its weights are half a Gaussian cut at 4σ."""
    sigma = draws.pixels(sigma, images)
    (chances,) = draws.drawn(images, generator, uniform=[()])
    slopes = [math.tan((chance - 0.5) * math.pi / 2) for chance in chances.tolist()]
    return streaked(images, slopes, sigma, 4 * sigma)


def zoom_blur(images: Tensor, zoom: float, generator: Generator) -> Tensor:
    """Average over zooms into the centre from 1 to `zoom`, in steps of a pixel at the edge of the longer side."""
    steps = max(6, math.ceil((zoom - 1) * max(images.shape[-2:]) / 2))
    total = images.clone()
    for step in range(1, steps + 1):
        total += magnified(images, 1 + (zoom - 1) * step / steps)
    return total / (steps + 1)
