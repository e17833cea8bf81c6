"""Filters and resampling, as sums of shifted or gathered copies.

Unlike a convolution's or a matrix product's, the bits of such sums do not depend on how many images share a batch.

Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth(images: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian of σ pixels, cut at 4σ, edges continued; σ 0 changes nothing."""
    if sigma == 0:
        return images
    radius = max(1, math.ceil(4 * sigma))
    weights = [math.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-radius, radius + 1)]
    total = sum(weights)
    height, width = images.shape[-2:]
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    rows = torch.zeros_like(padded[:, :, :height])
    for offset, weight in enumerate(weights):
        rows += padded[:, :, offset : offset + height] * (weight / total)
    blurred = torch.zeros_like(images)
    for offset, weight in enumerate(weights):
        blurred += rows[:, :, :, offset : offset + width] * (weight / total)
    return blurred


def filtered(images: Tensor, kernel: Sequence[Sequence[float]]) -> Tensor:
    """Correlate every channel with a square kernel of odd side, edges continued."""
    radius = len(kernel) // 2
    height, width = images.shape[-2:]
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    result = torch.zeros_like(images)
    for y, row in enumerate(kernel):
        for x, weight in enumerate(row):
            if weight:
                result += padded[:, :, y : y + height, x : x + width] * weight
    return result


def streaked(images: Tensor, slopes: Sequence[float], sigma: float, reach: float) -> Tensor:
    """Average each image along a ray of its own, which goes to the right and falls by `slope` pixels for each pixel.

    Weights are half a Gaussian of the distance along the ray. Edges are continued.

    Args:
        images: (B, C, H, W).
        slopes: B numbers in [-1, 1]; for steeper rays transpose the images.
        sigma: Of the Gaussian, pixels.
        reach: Length of the ray, pixels.
    """
    count, channels, height, width = images.shape
    steps = range(int(reach) + 1)
    weights = [
        [
            math.exp(-((step / sigma) ** 2) * (1 + slope**2) / 2) if step * math.hypot(1, slope) <= reach else 0.0
            for step in steps
        ]
        for slope in slopes
    ]
    weights_BS = torch.tensor([[weight / sum(row) for weight in row] for row in weights], dtype=torch.float64)
    falls_BS = torch.tensor(slopes, dtype=torch.float64)[:, None] * torch.arange(len(steps))
    above_BS = falls_BS.floor()
    below_share = (falls_BS - above_BS) * weights_BS
    above_share = (weights_BS - below_share).to(images)
    below_share = below_share.to(images)
    above_BS = above_BS.long().to(images.device)

    rows = F.pad(images, (0, len(steps) - 1, 0, 0), mode="replicate").reshape(count * channels * height, -1)
    first = (torch.arange(count * channels, device=images.device) * height).view(count, channels, 1)
    row = torch.arange(height, device=images.device)
    result = torch.zeros_like(images)
    for step in steps:
        shifted = rows[:, step : step + width]
        for down, share in ((0, above_share), (1, below_share)):
            taken = (row + (above_BS[:, step, None] + down)).clamp(0, height - 1)
            index = (first + taken[:, None]).flatten()
            result += shifted.index_select(0, index).view_as(images) * share[:, step].view(-1, 1, 1, 1)
    return result


def sampled(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear values of images (B, C, H, W) at rows `y` and columns `x` (B, H, W); beyond the edges they mirror."""
    top, left = y.floor(), x.floor()
    down, right = (y - top)[:, None], (x - left)[:, None]
    tops = [_mirrored(top.long() + offset, images.shape[2]) for offset in (0, 1)]
    lefts = [_mirrored(left.long() + offset, images.shape[3]) for offset in (0, 1)]
    upper, lower = ((_taken(images, row, lefts[0]), _taken(images, row, lefts[1])) for row in tops)
    # a·(1 − t) + b·t, and not a + (b − a)·t, so that the mean of equal values is that value and 0 ≤ t ≤ 1 stays inside.
    above = upper[0] * (1 - right) + upper[1] * right
    below = lower[0] * (1 - right) + lower[1] * right
    return above * (1 - down) + below * down


def magnified(images: Tensor, factor: float) -> Tensor:
    """Zoom into the centre by a factor of at least 1, bilinearly."""
    for dim in (2, 3):
        size = images.shape[dim]
        centre = (size - 1) / 2
        images = _interpolated(images, dim, (torch.arange(size, dtype=torch.float64) - centre) / factor + centre)
    return images


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Stretch to at least the images' own height and width, bilinearly; edges are continued."""
    for dim, size in ((2, height), (3, width)):
        own = images.shape[dim]
        positions = ((torch.arange(size, dtype=torch.float64) + 0.5) * own / size - 0.5).clamp(0, own - 1)
        images = _interpolated(images, dim, positions)
    return images


def enlarged(images: Tensor, factor: float) -> Tensor:
    """Zoom into the centre by a factor of at least 1, each pixel a rectangle."""
    for dim in (2, 3):
        size = images.shape[dim]
        positions = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / factor + size / 2
        images = images.index_select(dim, positions.long().to(images.device))
    return images


def _interpolated(images: Tensor, dim: int, positions: Tensor) -> Tensor:
    """Linear values along one axis at positions (float64) from 0 to the last index."""
    low = positions.floor()
    share = (positions - low).to(images).view((-1, 1) if dim == 2 else (-1,))
    low = low.long().to(images.device)
    high = (low + 1).clamp(max=images.shape[dim] - 1)
    return images.index_select(dim, low) * (1 - share) + images.index_select(dim, high) * share


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Indices with the mirror on the outer edge of the last pixel: -1 is 0, `size` is `size` - 1."""
    index = index.remainder(2 * size)
    return torch.minimum(index, 2 * size - 1 - index)


def _taken(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    index = (row * images.shape[3] + column).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, index).view_as(images)
