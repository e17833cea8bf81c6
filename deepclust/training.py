"""The training loop, one for all methods. It reports through callbacks and knows neither files nor tracking."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepclust import data, features, optim, seeding, views
from deepclust.errors import TrainingError
from deepclust.methods.base import Method

Normalise = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images of a step.
        rate: Learning rate after the warm-up.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay.
        warmup_epochs: Length of the linear warm-up.
        final_rate: Share of the rate that is left at the last step.
        crops: Resolutions of the crops.
        colour: Colour augmentation.
        seed: Decides order, views and everything else that is random.
    """

    epochs: int
    batch_size: int
    rate: float
    momentum: float
    weight_decay: float
    warmup_epochs: float
    final_rate: float
    crops: Sequence[views.Crop]
    colour: views.Colour
    seed: int


@dataclass(frozen=True)
class Step:
    """What one update did: its number from 0, epoch from 0, loss, learning rate and the method's own scalars."""

    step: int
    epoch: int
    loss: float
    rate: float
    logged: dict[str, float]


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: its number from 0, wall seconds of its steps, and how many of them went into batches
    and their views; on a GPU, which runs behind, into asking for them."""

    epoch: int
    seconds: float
    waiting_seconds: float
    images: int


def _ignore_step(_: Step) -> None:
    """For callers that do not watch the steps."""


def _ignore_epoch(_: Epoch) -> None:
    """For callers that do not watch the epochs."""


def train(
    method: Method,
    images: NDArray[np.uint8],
    recipe: Recipe,
    *,
    normalise: Normalise,
    device: torch.device,
    on_step: Callable[[Step], None] = _ignore_step,
    on_epoch: Callable[[Epoch], None] = _ignore_epoch,
) -> int:
    """Train a method in place.

    Args:
        method: The method, on the device.
        images: (N, H, W, C) uint8.
        recipe: How to train.
        normalise: Applied to crops (batch, C, S, S) in [0, 1] before the network sees them.
        device: Where to train.
        on_step: Called after every update.
        on_epoch: Called after every epoch, with the method in train mode.

    Returns:
        Number of updates made.

    Raises:
        TrainingError: If the loss is not finite; before the update, so the weights are still good.
        ConfigError: If the batch is larger than the data set.
    """
    method.check(len(images))
    source = data.Images(images, device)
    per_epoch = data.steps_per_epoch(len(source), recipe.batch_size)
    schedule = optim.Schedule(
        rate=recipe.rate,
        final_rate=recipe.final_rate,
        warmup_steps=round(recipe.warmup_epochs * per_epoch),
        total_steps=recipe.epochs * per_epoch,
    )
    optimiser = optim.sgd(method.parameter_groups(), momentum=recipe.momentum, weight_decay=recipe.weight_decay)

    def embed(module: nn.Module) -> Tensor:
        module.eval()

        result = features.extract(
            lambda batch: module(normalise(batch)), images, batch_size=2 * recipe.batch_size, device=device
        )
        module.train()
        return torch.from_numpy(result).to(device)

    step = 0
    for epoch in range(recipe.epochs):
        method.train()
        method.before_epoch(epoch, embed, seeding.derive(recipe.seed, "epoch", epoch))
        started, waiting = time.perf_counter(), 0.0
        for indices in data.batches(len(source), recipe.batch_size, seed=recipe.seed, epoch=epoch):
            asked = time.perf_counter()
            crops = views.multi_crop(
                source.batch(indices),
                crops=recipe.crops,
                colour=recipe.colour,
                generator=seeding.generator(recipe.seed, "views", step),
            )
            waiting += time.perf_counter() - asked
            rate = optim.set_rate(optimiser, schedule, step)
            loss, logged = method.loss(
                [normalise(crop) for crop in crops], indices, seeding.generator(recipe.seed, "method", step)
            )
            value = loss.item()
            if not np.isfinite(value):
                raise TrainingError(
                    f"expected a finite loss, got {value} in step {step} of epoch {epoch}, stopped before the update; "
                    f"lower optimiser.rate (now {rate:.3g}) or lengthen the warm-up"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            method.after_backward(step)
            optimiser.step()
            method.after_step(step)
            on_step(Step(step, epoch, value, rate, {name: float(scalar) for name, scalar in logged.items()}))
            step += 1
        on_epoch(Epoch(epoch, time.perf_counter() - started, waiting, per_epoch * recipe.batch_size))
    return step
