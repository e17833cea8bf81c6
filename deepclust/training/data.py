"""Prepared images as batches: seeded order, each batch with its indices, and training on any part of an epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust import seeding
from deepclust.methods.parts.base import at_most_images

_RESIDENT_SHARE = 0.25  # of a GPU's free memory that the images may take


class Images:
    """uint8 images (N, H, W, C) that give batches on the device; resident there if they take little of its memory."""

    def __init__(self, array: NDArray[np.uint8], device: torch.device) -> None:
        self.device = device
        self._array = array
        self._resident: Tensor | None = None
        if device.type == "cuda" and array.nbytes < _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            self._resident = torch.from_numpy(np.array(array)).to(device)

    def __len__(self) -> int:
        return len(self._array)

    def batch(self, indices: Tensor) -> Tensor:
        """Images (len(indices), H, W, C) on the device."""
        if self._resident is not None:
            return self._resident[indices.to(self.device, non_blocking=True)]
        # A gather through numpy copies: the memory map is read-only and torch needs its own memory.
        return torch.from_numpy(self._array[indices.numpy()]).to(self.device, non_blocking=True)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in `count` images; an incomplete last batch is left out, its images come in other epochs.

    Raises:
        ConfigError: If there is not one whole batch.
    """
    at_most_images("batch_size", batch_size, count)
    return count // batch_size


def batches(count: int, batch_size: int, *, seed: int, epoch: int, first_step: int = 0) -> Iterator[Tensor]:
    """Indices (batch_size,) of each batch of an epoch, in an order that `seed` and `epoch` decide.

    Args:
        count: Number of images.
        batch_size: Images of a batch.
        seed: Seed of the run.
        epoch: Number of the epoch.
        first_step: Batches to leave out at the start, for a run that goes on inside an epoch.
    """
    order = torch.randperm(count, generator=seeding.generator(seed, "order", epoch))
    for step in range(first_step, steps_per_epoch(count, batch_size)):
        yield order[step * batch_size : (step + 1) * batch_size]
