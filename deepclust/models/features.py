"""Encoder and images to features, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust.errors import DataError


def to_float(images_BHWC: Tensor) -> Tensor:
    """uint8 images to float (B, C, H, W) in [0, 1], channels last in memory."""
    return images_BHWC.permute(0, 3, 1, 2).float().div_(255)


def extract(
    encoder: Callable[[Tensor], Tensor], images: NDArray[np.uint8], *, batch_size: int, device: torch.device
) -> NDArray[np.float32]:
    """Features of images, row i from image i.

    Args:
        encoder: Images (batch, C, H, W) in [0, 1] to features (batch, D); a module in eval mode, as a rule.
        images: (N, H, W, C) uint8.
        batch_size: Images of a forward pass.
        device: Where the encoder is.

    Returns:
        (N, D) float32.

    Raises:
        DataError: If there are no images, or a feature is not finite.
    """
    features: NDArray[np.float32] | None = None
    for where, rows in _batches(encoder, images, slice(0, len(images)), batch_size, device):
        if features is None:
            features = np.empty((len(images), rows.shape[1]), dtype=np.float32)
        features[where] = rows
    assert features is not None
    return features


class Rows(Protocol):
    """Where rows can be written: an array, or a file."""

    def __setitem__(self, where: slice, rows: NDArray[np.float32], /) -> None:
        """Write some rows."""


def extract_into(
    features: Rows,
    encoder: Callable[[Tensor], Tensor],
    images: NDArray[np.uint8],
    *,
    rows: slice,
    batch_size: int,
    device: torch.device,
) -> None:
    """Write the features of some images into their rows, holding no more than a batch at a time.

    Args:
        features: (N, D) float32, of which only `rows` are touched.
        encoder: As for `extract`.
        images: All N, as for `extract`; as a rule a memory map too.
        rows: Start and stop of the images to embed; may be empty.
        batch_size: Images of a forward pass.
        device: Where the encoder is.

    Raises:
        DataError: If there are no images at all, or a feature is not finite; the rows before it are written then.
    """
    for where, embedded in _batches(encoder, images, rows, batch_size, device):
        features[where] = embedded


@torch.inference_mode()
def _batches(
    encoder: Callable[[Tensor], Tensor],
    images: NDArray[np.uint8],
    rows: slice,
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Batch by batch, which images they are and their finite features."""
    if len(images) == 0:
        raise DataError("expected at least one image to embed, got none")
    for start in range(rows.start, rows.stop, batch_size):
        where = slice(start, min(start + batch_size, rows.stop))
        batch = torch.from_numpy(np.array(images[where])).to(device)
        features: NDArray[np.float32] = encoder(to_float(batch)).float().cpu().numpy()
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            row = start + int(finite.argmin())
            raise DataError(f"expected finite features, got NaN or infinity from image {row}; the encoder has diverged")
        yield where, features
