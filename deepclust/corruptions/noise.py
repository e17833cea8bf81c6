"""Noise: independent in every value of an image, or every channel's of a pixel.

The benchmark draws Poisson numbers afresh at each severity; here one uniform number per value goes through the inverse
of Poisson's distribution, so that severities share it and every image takes as many.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Generator, Tensor

from deepclust.corruptions import draws


def gaussian_noise(images: Tensor, std: float, generator: Generator) -> Tensor:
    """Add independent normal noise to every value."""
    (noise,) = draws.drawn(images, generator, normal=[images.shape[1:]])
    return images + std * noise


def shot_noise(images: Tensor, photons: float, generator: Generator) -> Tensor:
    """Count photons: Poisson numbers whose mean is `photons` for the value 1, divided by it."""
    (noise,) = draws.drawn(images, generator, normal=[images.shape[1:]])
    counts = poisson_quantiles(noise.double().cpu().numpy(), images.detach().double().cpu().numpy() * photons)
    return torch.from_numpy(counts / photons).to(images)


def poisson_quantiles(normal: NDArray[np.float64], rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Poisson numbers that lie as high in their distributions as `normal` lies in the standard normal one.

    Those of scipy.stats.poisson.ppf, which takes four to ten times as long.

    Args:
        normal: Standard normal numbers, any shape.
        rates: Means, not negative, of the same shape.

    Returns:
        The smallest counts k with P(count ≤ k) ≥ Φ(normal), float64; 0 where the rate is 0.
    """
    counts = np.zeros_like(rates)
    lit = rates > 0
    rate, z = rates[lit], normal[lit]
    root = np.sqrt(rate)
    # Giles's expansion (Algorithm 955, ACM Transactions on Mathematical Software 42, 2016), less his half because we
    # round; it is off by less than (0.1 + z⁴/100) / rate (measured), so most counts are sure.
    guess = np.maximum(rate + root * z + (z**2 - 1) / 6 - (2 * z + z**3) / (72 * root), 0)
    count = np.round(guess)
    doubtful = np.flatnonzero(0.5 - np.abs(guess - count) < (0.1 + z**4 / 100) / rate)
    count[doubtful] = _stepped(count[doubtful], rate[doubtful], special.ndtr(z[doubtful]))
    counts[lit] = count
    return counts


def _stepped(count: NDArray[np.float64], rate: NDArray[np.float64], level: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smallest counts k with P(count ≤ k) ≥ level, found step by step from these."""
    low = np.flatnonzero(special.pdtr(count, rate) < level)
    while len(low):
        count[low] += 1
        low = low[special.pdtr(count[low], rate[low]) < level[low]]
    high = np.flatnonzero(count > 0)
    while len(high := high[special.pdtr(count[high] - 1, rate[high]) >= level[high]]):
        count[high] -= 1
        high = high[count[high] > 0]
    return count


def impulse_noise(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Replace a share of all values, half of them by 0 and half by 1."""
    (chance,) = draws.drawn(images, generator, uniform=[images.shape[1:]])
    return images.masked_fill(chance < share / 2, 0).masked_fill(chance >= 1 - share / 2, 1)
