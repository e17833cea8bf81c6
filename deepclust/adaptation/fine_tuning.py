"""Fine-tuning: a whole classifier trained on labelled images, from where it is."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from deepclust import config as configs
from deepclust.config import Count, Positive, Several, config
from deepclust.errors import DataError, TrainingError
from deepclust.models.features import to_float

WEIGHT_DECAY = 1e-4


@config
class Config(configs.Config):
    """The options of fine-tuning."""

    epochs: Count = 3
    """Passes over the labelled images."""
    batch_size: Several = 128
    """Images of an update; the last ones of an epoch that do not fill a batch are left out."""
    rate: Positive = 1e-3
    """AdamW's highest rate, at the start of a cosine."""


def fine_tune(
    model: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    config: Config,
    *,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """Train all parameters on the cross-entropy, by AdamW with a cosine schedule and without augmentation. In place.

    The model ends in eval mode.

    Args:
        model: Images (B, C, H, W) in [0, 1] to logits; on the device.
        images: (N, H, W, C) uint8, possibly memory-mapped.
        labels: (N,) classes; images of -1 are left out.
        config: The options.
        generator: Draws the order of the images; on the CPU.
        device: Where the model is.

    Raises:
        DataError: If there are fewer than two images.
        TrainingError: If the loss or its gradient is not finite; the parameters are then as before that step.
    """
    labelled = np.flatnonzero(labels >= 0)
    if len(labelled) < 2:
        raise DataError(f"expected at least two labelled images to fine-tune on, got {len(labelled)}; label more")
    epochs, rate, batch_size = config.epochs, config.rate, min(config.batch_size, len(labelled))
    steps = epochs * (len(labelled) // batch_size)
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    step = 0
    for _ in range(epochs):
        order = labelled[torch.randperm(len(labelled), generator=generator).numpy()]
        for start in range(0, len(labelled) - batch_size + 1, batch_size):
            rows = np.sort(order[start : start + batch_size])
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            logits = model(to_float(torch.from_numpy(images[rows])).to(device))
            loss = F.cross_entropy(logits, torch.from_numpy(labels[rows]).to(device))
            if not torch.isfinite(loss):
                raise TrainingError(f"fine-tuning: the loss of step {step} is {loss.item()}; lower the rate ({rate:g})")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            # A finite loss can have an infinite gradient, and after the last step no loss would tell.
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            if not all(torch.isfinite(gradient).all() for gradient in gradients):
                raise TrainingError(
                    f"fine-tuning: the gradient of step {step} is not finite; lower the rate ({rate:g})"
                )
            optimizer.step()
            step += 1
    model.eval().requires_grad_(False)
