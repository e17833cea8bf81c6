"""Encoder and images to features, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust.errors import DataError

# Of the images of a forward pass on a CPU, whose caches hold no more: 510 of 28 pixels a side, 15 of 160.
_PIXELS_AT_ONCE = 400_000


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
    for where, rows in batches(encoder, images, slice(0, len(images)), batch_size=batch_size, device=device):
        if features is None:
            features = np.empty((len(images), rows.shape[1]), dtype=np.float32)
        features[where] = rows
    assert features is not None
    return features


@torch.inference_mode()
def batches(
    encoder: Callable[[Tensor], Tensor],
    images: NDArray[np.uint8],
    rows: slice,
    *,
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Features of some images, a batch at a time, with the rows that they belong to.

    Args:
        encoder: As for `extract`.
        images: All N, as for `extract`; may be a memory map, of which a batch at a time is read.
        rows: Start and stop of the images to embed; may be empty.
        batch_size: Images of a forward pass; on a CPU fewer where they are large.
        device: Where the encoder is.

    Raises:
        DataError: If there are no images at all, or a feature is not finite.
    """
    if len(images) == 0:
        raise DataError("expected at least one image to embed, got none")
    if device.type == "cpu":
        side = getattr(encoder, "description", {}).get("input_size") or images.shape[1]
        batch_size = min(batch_size, max(1, _PIXELS_AT_ONCE // side**2))
    for start in range(rows.start, rows.stop, batch_size):
        where = slice(start, min(start + batch_size, rows.stop))
        batch = torch.from_numpy(np.array(images[where])).to(device)
        features: NDArray[np.float32] = encoder(to_float(batch)).float().cpu().numpy()
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            row = start + int(finite.argmin())
            raise DataError(f"expected finite features, got NaN or infinity from image {row}; the encoder has diverged")
        yield where, features
