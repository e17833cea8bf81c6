"""Corruptions: Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (arXiv 1903.12261).

The benchmark's fifteen; gaussian_blur (one of its extras) and rotation (not of the benchmark) come beside them.
Strengths are those of CIFAR-10-C (the authors' `make_cifar_c.py`, for images of 32×32 pixels) but where said.
What is different, deliberately:
- lengths are pixels of a 32-pixel side and grow with the shorter side, so that a severity looks the same at any size;
- images stay floats: the benchmark rounds to 8 bits (here JPEG alone does);
- a higher severity changes images more on average, which the benchmark's elastic and glass do not;
- shot_noise: by the inverse of Poisson's distribution, so that severities share their random numbers;
- defocus_blur: a disc with bilinear values in between, of the same spread (variance) as the benchmark's small kernels;
- glass_blur: every facet shows a place nearby; the benchmark swaps pixels with their neighbours one after the other,
  and rounds to 8 bits in between. The reach is ours, and σ from severity 3 on;
- motion_blur: the trail fades over 4σ; σ is 2.25 at severity 4, where the benchmark has 2 as at 3, and cuts later;
- zoom_blur: zooms a pixel apart at the edge and of equal weight (there: .01 apart, and the image itself twice);
- snow: flakes are cut out at the grain of a 32-pixel image and enlarged then;
- frost: ice is drawn, not photographed, and there is more of it at severities 4 and 5 (.47 and .6; there .4 and .45),
  where its darkening of the scene would otherwise undo it;
- fog: the fractal is spread over [0, 1] in the image, not in the square it is cut from;
- elastic_transform: strengths are ours: there the affine part shrinks as the warp grows, so that severity 1 moves most,
  and the warp's length does not grow with the image;
- pixelate: what a block's side is above one pixel grows with the image;
- rotation: a fixed angle, to either side by chance, the corners filled by reflection.

Limits: below some 16 pixels the weak blurs are finer than a pixel and change little, and pixelate joins just one
pair of rows and columns at every severity. JPEG's blocks are of 8 pixels at any size, so it changes large images less.

Random numbers are drawn image by image from a generator on the CPU, the same at every severity, so a stream is the same
however it is cut into batches, and on whatever device it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from deepclust.corruptions import blur, digital, noise, weather
from deepclust.errors import ConfigError, DataError

# Images are corrupted in parts of at most this many values: little memory beside them, and most of it in a cache.
VALUES_AT_ONCE = 2**18


class Corruption(NamedTuple):
    """A corruption and its strength at severities 1 to 5.

    Attributes:
        apply: Function of images (B, C, H, W), strength and a generator on the CPU; its result may leave [0, 1].
        strengths: One for each severity, a number or several; `apply` says of what.
    """

    apply: Callable[[Tensor, Any, Generator], Tensor]
    strengths: tuple[float | tuple[float, ...], ...]


SNOW = (
    (0.1, 0.2, 1.0, 0.6, 16.0, 3.0, 0.95),
    (0.1, 0.2, 1.0, 0.5, 20.0, 4.0, 0.9),
    (0.15, 0.3, 1.75, 0.55, 20.0, 4.0, 0.9),
    (0.25, 0.3, 2.25, 0.6, 24.0, 6.0, 0.85),
    (0.3, 0.3, 1.25, 0.65, 28.0, 12.0, 0.8),
)
ELASTIC = ((0.2, 2.0, 1.0), (0.3, 2.0, 1.2), (0.4, 2.0, 1.4), (0.5, 1.5, 1.6), (0.7, 1.5, 1.8))
# The fifteen of the benchmark in its order, and two more.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(noise.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(noise.shot_noise, (500.0, 250.0, 100.0, 75.0, 50.0)),
    "impulse_noise": Corruption(noise.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(blur.defocus_blur, (0.19, 0.5, 0.78, 0.94, 1.42)),
    "glass_blur": Corruption(blur.glass_blur, ((0.05, 0.8), (0.25, 1.1), (0.3, 1.4), (0.35, 1.7), (0.4, 2.0))),
    "motion_blur": Corruption(blur.motion_blur, (1.0, 1.5, 2.0, 2.25, 2.5)),
    "zoom_blur": Corruption(blur.zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": Corruption(weather.snow, SNOW),
    "frost": Corruption(weather.frost, ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.47), (0.75, 0.6))),
    "fog": Corruption(weather.fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "brightness": Corruption(digital.brightness, (0.05, 0.10, 0.15, 0.20, 0.30)),
    "contrast": Corruption(digital.contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(digital.elastic_transform, ELASTIC),
    "pixelate": Corruption(digital.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(digital.jpeg_compression, (80.0, 65.0, 58.0, 50.0, 40.0)),
    "gaussian_blur": Corruption(blur.gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "rotation": Corruption(digital.rotation, (8.0, 16.0, 24.0, 32.0, 40.0)),
}


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
    strength = corruption.strengths[severity - 1]
    cut = max(1, VALUES_AT_ONCE // images[0].numel())
    return torch.cat([corruption.apply(part, strength, generator).clamp(0, 1) for part in torch.split(images, cut)])


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
