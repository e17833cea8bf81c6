"""Brightness, contrast, elastic warps, pixels, JPEG, and rotation.

Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from deepclust.corruptions import draws
from deepclust.corruptions.filters import sampled, smooth


def brightness(images: Tensor, amount: float, generator: Generator) -> Tensor:
    """Add to the value of HSV, hue and saturation kept: channels are scaled alike, and black becomes grey."""
    value = images.amax(dim=1, keepdim=True)
    brighter = (value + amount).clamp(max=1)
    black = value == 0
    return torch.where(black, brighter, images * (brighter / value.masked_fill(black, 1)))


def contrast(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Keep a share of each value's distance to its channel's mean over the image."""
    mean = draws.mean(images)
    return (images - mean) * share + mean


def elastic_transform(images: Tensor, strength: tuple[float, float, float], generator: Generator) -> Tensor:
    """Move every pixel by a smooth random field and an affine map, bilinearly; the edges mirror.

    The strength, in pixels of a shorter side of 32 pixels: standard deviation of the field along each axis; σ of the
    Gaussian that makes it smooth; how far at most the affine map moves, along each axis, three points a third of the
    shorter side off the centre.
    """
    height, width = images.shape[-2:]
    noise, moves = draws.drawn(images, generator, normal=[(2, height, width)], uniform=[(2, 3, 1, 1)])
    std, sigma, affine = (draws.pixels(length, images) for length in strength)
    third = min(height, width) / 3
    y = torch.arange(height).to(images)[:, None]
    x = torch.arange(width).to(images)
    v, u = (y - (height - 1) / 2) / third, (x - (width - 1) / 2) / third
    # The one affine map with these moves at (u, v) = (1, 1), (1, -1) and (-1, -1).
    first, second, last = ((2 * moves - 1) * affine).unbind(dim=2)
    offsets = (first + last) / 2 + (second - last) / 2 * u + (first - second) / 2 * v
    offsets = offsets + std * _standardised(noise, sigma)
    return sampled(images, y + offsets[:, 0], x + offsets[:, 1])


def _standardised(noise: Tensor, sigma: float) -> Tensor:
    """Standard normal noise made smooth, with its standard deviation kept (away from the edges)."""
    if sigma == 0:
        return noise
    impulse = torch.zeros(1, 1, 1, 2 * math.ceil(4 * sigma) + 3, dtype=torch.float64)
    impulse[..., impulse.shape[3] // 2] = 1
    # The image of an impulse in one row is the kernel of one axis: along the other the edges are continued.
    return smooth(noise, sigma) / float(smooth(impulse, sigma).square().sum())


def pixelate(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Show each block of pixels by its mean.

    The share is that of blocks to pixels along a side of 32 pixels. What a block's side is above one pixel grows with
    the image.
    """
    block = 1 + draws.pixels(1 / share - 1, images)
    for dim in (2, 3):
        images = _blocks(images, dim, min(int(images.shape[dim] / block), images.shape[dim] - 1))
    return images


def _blocks(images: Tensor, dim: int, count: int) -> Tensor:
    """Means over `count` blocks along one axis; a pixel belongs to the block its middle falls into."""
    size = images.shape[dim]
    count = max(count, 1)
    block = ((2 * torch.arange(size) + 1) * count).div(2 * size, rounding_mode="floor")
    lengths = torch.bincount(block, minlength=count)
    starts = lengths.cumsum(0) - lengths
    shape = (-1, 1) if dim == 2 else (-1,)
    total = torch.zeros_like(images.narrow(dim, 0, count))
    for offset in range(int(lengths.max())):
        index = (starts + offset).clamp(max=size - 1).to(images.device)
        total += images.index_select(dim, index) * (lengths > offset).to(images).view(shape)
    return (total / lengths.to(images).view(shape)).index_select(dim, block.to(images.device))


def jpeg_compression(images: Tensor, quality: float, generator: Generator) -> Tensor:
    """Encode as JPEG at a quality of 1 to 100 and decode, on the CPU; grey as grey, colour with halved chroma."""
    bytes_BCHW = (images * 255).round().to("cpu", torch.uint8)
    decoded = [decode_jpeg(encode_jpeg(image, quality=int(quality))) for image in bytes_BCHW]
    return torch.stack(decoded).to(images) / 255


def rotation(images: Tensor, degrees: float, generator: Generator) -> Tensor:
    """Rotate about the centre by the degrees, clockwise or counterclockwise with equal chance, bilinearly."""
    signs = torch.stack([torch.randint(2, (), generator=generator) for _ in range(len(images))]) * 2.0 - 1.0
    height, width = images.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), signs.to(images).view(-1, 1, 1) * math.sin(math.radians(degrees))
    y = (torch.arange(height).to(images) - (height - 1) / 2).view(1, -1, 1)
    x = (torch.arange(width).to(images) - (width - 1) / 2).view(1, 1, -1)
    # grid_sample wants coordinates in [-1, 1] from edge to edge: half a side is 1.
    source_x = (cos * x - sin * y) / (width / 2)
    source_y = (sin * x + cos * y) / (height / 2)
    grid = torch.stack([source_x, source_y], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
