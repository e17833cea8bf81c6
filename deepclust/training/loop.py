"""The training loop, one for all methods. It reports through callbacks and knows neither files nor tracking."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from deepclust import distributed, seeding
from deepclust.errors import DataError, TrainingError
from deepclust.methods.parts.base import Method
from deepclust.models import features
from deepclust.training import data, optim, resume, views
from deepclust.training.checkpoint import restore_like

Normalise = Callable[[Tensor], Tensor]
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Step:
    """What one update did.

    Attributes:
        step: Its number, from 0.
        epoch: Its epoch, from 0.
        loss: Loss before the update.
        rate: The scheduled learning rate.
        gradient_norm: Norm of the whole gradient before clipping; with fp16 it may be infinite, and the update was
            then left out.
        logged: The method's own scalars.
    """

    step: int
    epoch: int
    loss: float
    rate: float
    gradient_norm: float
    logged: dict[str, float]


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: its number from 0, wall seconds of its steps, how many of them went into batches and their
    views (on a GPU, which runs behind, into asking for them), and its images; where the run was resumed, since then."""

    epoch: int
    seconds: float
    waiting_seconds: float
    images: int


def effective_precision(precision: optim.Precision, device: torch.device) -> optim.Precision:
    """The precision that a device really trains in.

    Half precision only on a GPU, bf16 only on one that computes in it: elsewhere autocast is slower than float32.
    """
    if device.type != "cuda":
        return "float32"
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float32"
    return precision


def train(
    method: Method,
    images: NDArray[np.uint8],
    *,
    seed: int,
    precision: optim.Precision,
    normalise: Normalise,
    device: torch.device,
    on_step: Callable[[Step], None] = lambda _: None,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
    saving: resume.Saving | None = None,
) -> int:
    """Train a method in place, alone or as one of several processes (distributed.py) that each call this.

    The batch, its order, views and draws are those of one process; each computes an equal part of it.

    Args:
        method: The method, on the device.
        images: (N, H, W, C) uint8.
        seed: Decides order, views and everything else that is random.
        precision: `float32`, or `bf16` or `fp16` for autocast where the device has it; see `effective_precision`.
        normalise: Applied to crops (batch, C, S, S) in [0, 1] before the network sees them.
        device: Where to train.
        on_step: Called after every update.
        on_epoch: Called after every epoch, with the method in train mode; if it fails on one process, it does on all.
        saving: Where the run's state is kept; a run that is there goes on, bit for bit where it runs on as many
            processes as before.

    Returns:
        Number of updates made.

    Raises:
        TrainingError: If the loss or the gradient is not finite; before the update, so the weights are still good.
        ConfigError: If the batch is larger than the data set or cannot be divided among the processes, or the method
            refuses the data set.
        CheckpointError: If the state cannot be restored or saved.
        PreemptedError: If a process was told to stop; the state is saved then.
    """
    config = method.config
    own_rows = distributed.part(torch.arange(config.batch_size), config.accumulate)
    method.check(len(images))
    method.bind(len(images))
    distributed.synchronise(method)
    source = data.Images(images, device)
    per_epoch = data.steps_per_epoch(len(source), config.batch_size)
    schedule = optim.schedule(
        config.optimiser, batch_size=config.batch_size, epochs=config.epochs, steps_per_epoch=per_epoch
    )
    update = _Update(method, precision, device)

    def embed(module: nn.Module) -> Tensor:
        module.eval()
        own = images[distributed.share(len(images))]
        result = features.extract(
            lambda batch: module(normalise(batch)), own, batch_size=2 * config.batch_size, device=device
        )
        module.train()
        return torch.from_numpy(result).to(device)

    keeper = resume.Keeper(saving, {"method": method, "update": update})
    step = first = keeper.restore()
    for epoch in range(first // per_epoch, config.epochs):
        method.train()
        done = step % per_epoch  # above 0 where a run goes on inside an epoch, whose clusters are in its state
        if not done:
            try:
                method.before_epoch(epoch, embed, seeding.derive(seed, "epoch", epoch))
            except DataError as error:  # features that are not finite; the images were checked long ago
                raise TrainingError(
                    f"before epoch {epoch}: {error}; lower optimiser.rate or lengthen the warm-up"
                ) from error
        started, waiting = time.perf_counter(), 0.0
        for batch in data.batches(len(source), config.batch_size, seed=seed, epoch=epoch, first_step=done):
            asked = time.perf_counter()
            indices = batch[own_rows]
            crops = views.multi_crop(
                source.batch(indices),
                crops=config.crops,
                colour=config.colour,
                generator=seeding.Part(seeding.generator(seed, "views", step), own_rows, config.batch_size),
            )
            waiting += time.perf_counter() - asked
            rate = optim.set_rate(update.optimiser, schedule, step)
            method.before_step(step)
            with seeding.seeded(seed, "network", step, distributed.rank()):  # dropout, where a backbone has it
                loss, norm, logged, wishes = update.prepare(
                    method,
                    [normalise(crop) for crop in crops],
                    indices,
                    seeding.generator(seed, "method", step),
                    keeper.wishes(step),
                )
            update.check(loss, norm, where=f"step {step} of epoch {epoch}", rate=rate)
            update.apply()
            method.after_step(step)
            on_step(Step(step, epoch, loss, rate, norm, logged))
            step += 1
            if step % per_epoch:
                keeper.after(step - 1, wishes)
        with distributed.together():
            images_done = (per_epoch - done) * config.batch_size
            on_epoch(Epoch(epoch, time.perf_counter() - started, waiting, images_done))
        keeper.after(step - 1, wishes)
    return step


class _Update:
    """From a batch to gradients and from these to an update, in parts and in the precision that is wanted."""

    def __init__(self, method: Method, precision: optim.Precision, device: torch.device) -> None:
        config = method.config
        self.optimiser = optim.build(config.optimiser, method.parameter_groups())
        self._parts = config.accumulate
        precision = effective_precision(precision, device)
        # What is switched off passes everything through, bit for bit: autocast, the scaler, and an infinite norm.
        self._autocast = torch.autocast(device.type, dtype=_HALF.get(precision), enabled=precision in _HALF)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._largest_norm = math.inf if config.optimiser.clip_norm is None else config.optimiser.clip_norm

    def prepare(
        self, method: Method, crops: list[Tensor], indices: Tensor, generator: torch.Generator, wishes: Tensor
    ) -> tuple[float, float, dict[str, float], list[float]]:
        """Put the clipped gradient of the batch of all processes into the parameters.

        Returns:
            Loss, norm of the gradient before clipping, the method's scalars and what the processes wish; means over
            the parts and the processes.
        """
        self.optimiser.zero_grad(set_to_none=True)
        parts = []
        for part_indices, *part_crops in zip(*(rows.chunk(self._parts) for rows in (indices, *crops)), strict=True):
            with self._autocast:
                loss, logged = method.loss(part_crops, part_indices, generator)
            self._scaler.scale(loss / self._parts).backward()  # type: ignore[no-untyped-call]
            parts.append(torch.stack([loss.detach(), *(scalar.to(loss.device) for scalar in logged.values())]))
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        # Before the scaler looks for what is not finite: all processes have to come to the same verdict.
        distributed.average_gradients(parameters)
        self._scaler.unscale_(self.optimiser)
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        clip_grads_with_norm_(parameters, self._largest_norm, norm)
        # One synchronisation a step, of processes and with a GPU, for all numbers together.
        numbers = torch.cat([torch.stack(parts).mean(0), norm.view(1), wishes.to(norm, non_blocking=True)])
        value, *scalars, norm_value, save, stop = distributed.all_mean(numbers).tolist()
        return value, norm_value, dict(zip(logged, scalars, strict=True)), [save, stop]

    def check(self, loss: float, gradient_norm: float, *, where: str, rate: float) -> None:
        """Refuse to update from what is not finite; with fp16 a gradient that is not is the scaler's business."""
        norm_checked = 0.0 if self._scaler.is_enabled() else gradient_norm
        for name, value in (("loss", loss), ("gradient norm", norm_checked)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"expected a finite {name}, got {value} in {where}, stopped before the update; "
                    f"lower optimiser.rate (now {rate:.3g}) or lengthen the warm-up"
                )

    def apply(self) -> None:
        """Update the parameters; with fp16, unless the gradient is not finite."""
        self._scaler.step(self.optimiser)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The state of optimiser and scaler."""
        return {"optimiser": self.optimiser.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state, with the parameters' order in memory: the sum of a norm depends on it."""
        self.optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:  # empty where the device of then had no half precision
            self._scaler.load_state_dict(state["scaler"])
        for parameter, values in self.optimiser.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = restore_like(value, parameter)
