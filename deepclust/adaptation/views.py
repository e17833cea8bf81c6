"""A second view of a batch, for adapters that ask for consistent predictions.

RoTTA and ROID were published with the augmentation of CoTTA (arXiv 2203.13591): colour jitter with hue and saturation,
rotation, scale, blur, and clipping to [0, 1]. That assumes colour photographs whose normalisation is known. An adapter
knows neither, so this is deliberately modest, and its strengths are in units of the batch's standard deviation.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 16
"""The longest shift along a side is the side's length divided by this, rounded down, as in CoTTA's augmentation."""
CONTRAST = 0.3
"""Contrast is changed by a factor of 1 ± this, as in CoTTA's augmentation."""
BRIGHTNESS = 0.2
"""Brightness is changed by up to this many standard deviations of the batch's values."""
NOISE = 0.02
"""Standard deviation of the noise, in standard deviations of the batch's values; about CoTTA's .005 of [0, 1]."""


def view(images: Tensor, *, generator: torch.Generator, flip: bool) -> Tensor:
    """Each image shifted, perhaps flipped, of another contrast and brightness, and a little noisy.

    Images (B, C, H, W) of any size are shifted, repeating their border, and flipped left to right every second time;
    inputs of other dimensions, which have no such directions, are not. Values stay within the batch's own range.

    Args:
        images: (B, …), in whatever scale; not changed.
        generator: Source of all randomness, on the CPU, so that the views are those of any device.
        flip: Whether images may be flipped; not where left and right make a difference, as with digits and letters.
    """
    count = len(images)
    each = (count, *[1] * (images.dim() - 1))
    seen = _moved(images, generator=generator, flip=flip) if images.dim() == 4 else images
    contrast = 1 + CONTRAST * (2 * torch.rand(each, generator=generator) - 1)
    brightness = BRIGHTNESS * (2 * torch.rand(each, generator=generator) - 1)
    noise = NOISE * torch.randn(images.shape, generator=generator)
    scale = images.std(correction=0)
    mean = seen.mean(dim=list(range(1, images.dim())), keepdim=True)
    seen = mean + (seen - mean) * contrast.to(images) + (brightness + noise).to(images) * scale
    return seen.clamp(images.min(), images.max())


def _moved(images_BCHW: Tensor, *, generator: torch.Generator, flip: bool) -> Tensor:
    count, channels, height, width = images_BCHW.shape
    longest_y, longest_x = height // SHIFT, width // SHIFT
    down_B1 = torch.randint(-longest_y, longest_y + 1, (count, 1), generator=generator)
    right_B1 = torch.randint(-longest_x, longest_x + 1, (count, 1), generator=generator)
    rows_BH = (torch.arange(height) + down_B1).clamp(0, height - 1)
    columns_BW = (torch.arange(width) + right_B1).clamp(0, width - 1)
    if flip:
        flipped_B1 = torch.rand((count, 1), generator=generator) < 0.5
        columns_BW = torch.where(flipped_B1, width - 1 - columns_BW, columns_BW)
    rows = rows_BH.to(images_BCHW.device).view(count, 1, height, 1).expand(-1, channels, -1, width)
    columns = columns_BW.to(images_BCHW.device).view(count, 1, 1, width).expand(-1, channels, height, -1)
    return images_BCHW.gather(2, rows).gather(3, columns)
