"""Sizes that follow from the data where nobody states them: prototypes, queues, clusters and negatives.

The rules join the published settings at both ends. Prototypes: 3,000 for ImageNet (SwAV, arXiv 2006.09882; the rule
gives 4,000), about ten for each class of a small set. Keys: 65,536 for ImageNet and 4,096 at CIFAR's size (MoCo, arXiv
1911.05722, and its CIFAR demonstration; with batches of 256 the rule gives 85,504 and 3,328). Clusters: one for 51, 26
and 13 images on ImageNet, one for 200, 100 and 50 on CIFAR (PCL, arXiv 2005.04966); the rule takes 120, 60 and 30.
"""

from __future__ import annotations

import math

from deepclust.errors import ConfigError

_MOST_NEGATIVES = 16384  # PCL's on ImageNet


def prototypes(images: int, image_size: int) -> int:
    """√images · image_size / 64 to one significant digit; at least 10, at most a fifth of the images (at least 2)."""
    wanted = math.sqrt(images) * image_size / 64
    return max(2, min(max(10, _rounded(wanted, digits=1)), images // 5))


def swav_queue(prototypes: int, batch_size: int, images: int, *, part: int) -> int:
    """Embeddings in SwAV's queue: none if there are as many images at once as prototypes.

    Otherwise as many whole batches as bring the part of a batch that is computed at once, and the queue, to the number
    of prototypes; at most a quarter of the images, so that the oldest embedding is not from an epoch ago.
    """
    batches = math.ceil(max(0, prototypes - part) / batch_size)
    return min(batches, images // 4 // batch_size) * batch_size


def key_queue(images: int, batch_size: int) -> int:
    """Keys in MoCo's and PCL's queue: a fifteenth of the images in whole batches, at least one batch."""
    return max(1, math.floor(images / (15 * batch_size) + 0.5)) * batch_size


def clusters(images: int, batch_size: int) -> tuple[int, ...]:
    """PCL's granularities: a cluster for every 120, 60 and 30 images, to two significant digits.

    The smallest is at least one and a half batches, so that negatives are left when each image of a batch has a cluster
    of its own, and a granularity is at most half the images.

    Raises:
        ConfigError: If the batch is too large for the data.
    """
    most = images // 2
    least = math.ceil(1.5 * batch_size)
    if least > most:
        largest = most * 2 // 3
        remedy = f"lower batch_size to at most {largest}" if largest > 1 else "add images, to at least 6"
        raise ConfigError(
            f"expected at least {2 * least} images for automatic clusters with batches of {batch_size}, got {images}; "
            f"{remedy}"
        )
    smallest = max(least, _rounded(images / 120, digits=2))
    return tuple(dict.fromkeys(min(most, factor * smallest) for factor in (1, 2, 4)))


def negatives(clusters: tuple[int, ...], batch_size: int) -> int:
    """PCL's negatives in each granularity: all clusters that the batch must leave in the smallest, at most 16,384."""
    return min(_MOST_NEGATIVES, min(clusters) - batch_size)


def _rounded(value: float, *, digits: int) -> int:
    """A positive number to so many significant digits."""
    unit = 10 ** max(0, math.floor(math.log10(max(value, 1))) - digits + 1)
    return int(math.floor(value / unit + 0.5) * unit)
