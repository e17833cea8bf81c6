"""Encoder and images to features, in order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust.errors import DataError
from deepclust.views import to_float


@torch.inference_mode()
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
    if len(images) == 0:
        raise DataError("expected at least one image to embed, got none")
    features: NDArray[np.float32] | None = None
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
        rows = encoder(to_float(batch)).float().cpu().numpy()
        if features is None:
            features = np.empty((len(images), rows.shape[1]), dtype=np.float32)
        features[start : start + len(rows)] = rows
    assert features is not None
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise DataError(f"expected finite features, got NaN or infinity from image {row}; the encoder has diverged")
    return features
