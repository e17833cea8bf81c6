"""Random numbers and sums whose bits do not depend on which images share a batch.

Numbers are drawn image by image on the CPU. Functions like `exp` and sums over a whole dimension are kept away from
tensors of images: a vector's last elements may take another path than the rest, and a sum another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

REFERENCE_SIDE = 32
Shapes = Sequence[tuple[int, ...]]


def drawn(images: Tensor, generator: Generator, *, normal: Shapes = (), uniform: Shapes = ()) -> list[Tensor]:
    """Standard normal numbers (B, *shape) and uniform ones in [0, 1), of the images' type and on their device."""
    rows = [
        [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in normal]
        + [torch.rand(shape, generator=generator, dtype=torch.float32) for shape in uniform]
        for _ in range(len(images))
    ]
    return [torch.stack(column).to(images) for column in zip(*rows, strict=True)]


def pixels(length: float, images: Tensor) -> float:
    """A length in pixels of a 32-pixel side as pixels of these images, by their shorter side."""
    return length * min(images.shape[-2:]) / REFERENCE_SIDE


def mean(images: Tensor) -> Tensor:
    """Mean of each channel, (B, C, 1, 1), by halving: the order of the sum is the same in any batch and device."""
    values = images.flatten(2)
    count = values.shape[2]
    values = F.pad(values, (0, (1 << (count - 1).bit_length()) - count))
    while (half := values.shape[2] // 2) > 0:
        values = values[:, :, :half] + values[:, :, half:]
    return values[..., None] / count


def grey(images: Tensor) -> Tensor:
    """Luminance (B, 1, H, W) by the weights of ITU-R BT.601; a grey image is its own."""
    if images.shape[1] == 1:
        return images
    return 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]
