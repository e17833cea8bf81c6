"""Augmentation of whole batches on the device, every image with its own randomness.

Crop, resize and flip are two small matrix products an image: a resampling along y and one along x, whose rows are the
same antialiased triangle filter that torchvision applies after cropping. The colour operations are torchvision's, in
the fixed order brightness, contrast, saturation, hue (torchvision shuffles it per image).

What is drawn on the CPU goes to a GPU without waiting for it (`non_blocking`): the copy takes its turn behind what the
GPU still computes, and CUDA has read the CPU's memory when the call returns, as it is not pinned.

B batch, C channels, H W side of the image, S side of the crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deepclust.config import Config, Few, Positive, Share, Turn, config
from deepclust.models.features import to_float
from deepclust.seeding import Part, uniform

_ATTEMPTS = 10
_GREY = (0.299, 0.587, 0.114)
_BLUR_SIGMA = (0.1, 2.0)


@config
class Crop(Config):
    """Random resized crops of one resolution."""

    count: Few = 2
    """How many of each image."""
    size: Positive = 1.0
    """Side after resizing: whole pixels, or a share of the image's side if at most 1."""
    scale: tuple[Share, Share] = (0.2, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest width to height."""

    def _check(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be [low, high] with 0 < low <= high, got {list(self.scale)}")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio must be [low, high] with low <= high, got {list(self.ratio)}")
        if self.size > 1 and self.size != int(self.size):
            raise ValueError(f"size must be whole pixels, or a share of at most 1; got {self.size}")

    def pixels(self, image_size: int) -> int:
        """Side of the crop for images of `image_size` pixels; a share is rounded, and at least 8 pixels."""
        return int(self.size) if self.size > 1 else max(8, round(self.size * image_size))


@config
class Colour(Config):
    """Flip and colour augmentation: probabilities, and the strengths of torchvision's ColorJitter."""

    flip: Share = 0.5
    """Probability of a horizontal flip."""
    jitter: Share = 0.8
    """Probability of the colour jitter."""
    brightness: Share = 0.4
    """Strength: factors within 1 ± this."""
    contrast: Share = 0.4
    """Strength: factors within 1 ± this."""
    saturation: Share = 0.4
    """Strength: factors within 1 ± this."""
    hue: Turn = 0.1
    """Strength: shifts within ± this share of a turn."""
    grey: Share = 0.2
    """Probability of a grey image."""
    blur: Share = 0.5
    """Probability of a Gaussian blur."""


def multi_crop(
    images_BHWC: Tensor, *, crops: Sequence[Crop], colour: Colour, generator: torch.Generator | Part
) -> list[Tensor]:
    """All crops of a batch, the resolutions in the order given.

    Args:
        images_BHWC: uint8 images.
        crops: Resolutions.
        colour: Probabilities and strengths.
        generator: CPU generator; the same state gives the same views on any device. Or a part of a batch's randomness.

    Returns:
        One tensor (B, C, S, S) in [0, 1] for each crop, channels last in memory.
    """
    images = to_float(images_BHWC)
    return [_view(images, crop, colour, generator) for crop in crops for _ in range(crop.count)]


def _view(images: Tensor, crop: Crop, colour: Colour, generator: torch.Generator | Part) -> Tensor:
    batch, _, height, width = images.shape
    boxes = random_boxes(batch, height=height, width=width, scale=crop.scale, ratio=crop.ratio, generator=generator)
    flips = uniform(batch, generator=generator) < colour.flip
    view = resample(images, boxes, flips, size=crop.pixels(height))
    view = _jitter(view, colour, generator)
    if colour.blur > 0:
        view = _blur(view, colour.blur, generator)
    return view.contiguous(memory_format=torch.channels_last)


def random_boxes(
    batch: int,
    *,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: torch.Generator | Part,
) -> Tensor:
    """Boxes (B, 4) of top, left, height, width, drawn as torchvision's RandomResizedCrop draws them.

    Each image takes the first of ten candidates that fits; where none does, the largest centred box of a valid ratio.
    """
    area = height * width * uniform(batch, _ATTEMPTS, low=scale[0], high=scale[1], generator=generator)
    log_ratio = uniform(batch, _ATTEMPTS, low=math.log(ratio[0]), high=math.log(ratio[1]), generator=generator)
    w = (area * log_ratio.exp()).sqrt().round().long()
    h = (area * (-log_ratio).exp()).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    any_fits = fits.any(1)
    fallback_w = round(height * ratio[1]) if width / height > ratio[1] else width
    fallback_h = round(width / ratio[0]) if width / height < ratio[0] else height
    w = torch.where(any_fits, w.gather(1, first).squeeze(1), fallback_w)
    h = torch.where(any_fits, h.gather(1, first).squeeze(1), fallback_h)
    where = uniform(batch, 2, generator=generator)
    top = torch.where(any_fits, (where[:, 0] * (height - h + 1)).long(), (height - h) // 2)
    left = torch.where(any_fits, (where[:, 1] * (width - w + 1)).long(), (width - w) // 2)
    return torch.stack((top, left, h, w), dim=1)


def resample(images_BCHW: Tensor, boxes_B4: Tensor, flips_B: Tensor, *, size: int) -> Tensor:
    """Cut a box out of each image, resize it to `size` pixels (bilinear, antialiased), mirror it where asked."""
    _, _, height, width = images_BCHW.shape
    boxes = boxes_B4.to(images_BCHW, non_blocking=True)
    rows = _filter(boxes[:, 0], boxes[:, 2], inputs=height, outputs=size)
    columns = _filter(boxes[:, 1], boxes[:, 3], inputs=width, outputs=size)
    flips = flips_B.to(columns.device, non_blocking=True)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    return (rows[:, None] @ images_BCHW) @ columns.transpose(1, 2)[:, None]


def _filter(start_B: Tensor, length_B: Tensor, *, inputs: int, outputs: int) -> Tensor:
    """Matrices (B, outputs, inputs) of the triangle filter that resizes [start, start + length) to `outputs` pixels."""
    scale = (length_B / outputs)[:, None, None]
    position = torch.arange(outputs, device=start_B.device, dtype=start_B.dtype)[None, :, None] + 0.5
    centre = start_B[:, None, None] + position * scale
    pixel = torch.arange(inputs, device=start_B.device, dtype=start_B.dtype)[None, None, :] + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp_(min=0)
    end = (start_B + length_B)[:, None, None]
    weight = weight * ((pixel > start_B[:, None, None]) & (pixel < end))
    return weight / weight.sum(2, keepdim=True)


def _jitter(view: Tensor, colour: Colour, generator: torch.Generator | Part) -> Tensor:
    batch, channels = view.shape[:2]
    applied = uniform(batch, generator=generator) < colour.jitter

    def factors(low: float, high: float, neutral: float) -> Tensor:
        drawn = uniform(batch, low=low, high=high, generator=generator)
        return torch.where(applied, drawn, neutral).to(view, non_blocking=True).view(-1, 1, 1, 1)

    brightness = factors(max(0.0, 1 - colour.brightness), 1 + colour.brightness, 1.0)
    contrast = factors(max(0.0, 1 - colour.contrast), 1 + colour.contrast, 1.0)
    saturation = factors(max(0.0, 1 - colour.saturation), 1 + colour.saturation, 1.0)
    hue = factors(-colour.hue, colour.hue, 0.0)
    grey = (uniform(batch, generator=generator) < colour.grey).to(view.device, non_blocking=True).view(-1, 1, 1, 1)
    view = (view * brightness).clamp_(0, 1)
    mean = to_grey(view).mean((1, 2, 3), keepdim=True)
    view = (mean + contrast * (view - mean)).clamp_(0, 1)
    if channels == 3:
        luma = to_grey(view)
        view = (luma + saturation * (view - luma)).clamp_(0, 1)
        if colour.hue > 0:
            view = shift_hue(view, hue)
        view = torch.where(grey, to_grey(view), view)
    return view


def to_grey(images_BCHW: Tensor) -> Tensor:
    """Luma (B, 1, H, W) by ITU-R 601; grey images as they are."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    weight = torch.tensor(_GREY).to(images_BCHW, non_blocking=True).view(1, 3, 1, 1)
    return (images_BCHW * weight).sum(1, keepdim=True)


def shift_hue(images_BCHW: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images in [0, 1] by `shift` (broadcast over B, 1, 1, 1) turns, through HSV."""
    value, _ = images_BCHW.max(1, keepdim=True)
    chroma = value - images_BCHW.min(1, keepdim=True).values
    red, green, blue = images_BCHW.chunk(3, dim=1)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * shift
    # The closed form of HSV to RGB: channel n is V − C·max(0, min(k, 4 − k, 1)) with k = (n + 6h) mod 6, n = 5, 3, 1.
    offset = torch.tensor([5.0, 3.0, 1.0]).to(images_BCHW, non_blocking=True).view(1, 3, 1, 1)
    k = torch.remainder(offset + hue, 6)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(view: Tensor, probability: float, generator: torch.Generator | Part) -> Tensor:
    """Gaussian blur with its own sigma for each image (SimCLR, appendix A: kernel a tenth of the side)."""
    batch, size = view.shape[0], view.shape[-1]
    applied = (uniform(batch, generator=generator) < probability).view(-1, 1, 1)
    sigma = uniform(batch, 1, 1, low=_BLUR_SIGMA[0], high=_BLUR_SIGMA[1], generator=generator)
    position = torch.arange(size, dtype=torch.float32)
    distance = (position[:, None] - position[None, :]).abs()
    weight = torch.exp(-(distance**2) / (2 * sigma**2)) * (distance <= max(1, size // 20))
    kernel = torch.where(applied, weight / weight.sum(2, keepdim=True), torch.eye(size))
    kernel = kernel.to(view, non_blocking=True)[:, None]
    return kernel @ view @ kernel.transpose(2, 3)
