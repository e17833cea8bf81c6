"""The optimisers by name, the groups of parameters they treat alike, and the schedule, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepclust.errors import ConfigError

RATE_BATCH = 256  # images of the update that a stated rate is for
_EPSILON = 1e-8  # keeps the local rate of LARS finite


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """How the parameters move.

    Attributes:
        name: `sgd`, `lars`, `larc` or `adamw`.
        rate: Learning rate after the warm-up for an update on 256 images; scaled linearly with the batch size
            (arXiv 1706.02677, section 2.1).
        weight_decay: Weight decay; decoupled in AdamW, part of the gradient elsewhere.
        decay_norm_and_bias: Whether parameters of one dimension (norms, biases) decay too. If not, LARS and LARC do
            not adapt their rate either.
        clip_norm: Largest norm of the whole gradient; None leaves it as it is.
        warmup_epochs: Length of the linear warm-up.
        final_rate: Share of the rate that the cosine ends at.
        options: The optimiser's own: `momentum` (sgd); `momentum`, `trust` (lars, larc); `betas` (adamw).

    Raises:
        ConfigError: If there is no such optimiser, or its options are not exactly those it has.
    """

    name: str
    rate: float
    weight_decay: float
    decay_norm_and_bias: bool
    clip_norm: float | None
    warmup_epochs: float
    final_rate: float
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.name not in OPTIMISERS:
            raise ConfigError(f"optimiser.name: expected one of {', '.join(OPTIMISERS)}; got {self.name!r}")
        _, expected = OPTIMISERS[self.name]
        if set(self.options) != expected:
            raise ConfigError(
                f"optimiser: {self.name} takes {', '.join(sorted(expected))}; "
                f"got {', '.join(sorted(self.options)) or 'nothing'}; state exactly these"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"optimiser.clip_norm: expected a positive norm, or null for none; got {self.clip_norm}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a cosine.

    Attributes:
        rate: Learning rate after the warm-up.
        final_rate: Share of `rate` that the cosine ends at, one step after the last.
        warmup_steps: Steps of the warm-up.
        total_steps: Steps of the whole run.
    """

    rate: float
    final_rate: float
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        low = self.rate * self.final_rate
        return low + (self.rate - low) * (1 + math.cos(math.pi * progress)) / 2


def schedule(settings: Optimiser, *, batch_size: int, epochs: int, steps_per_epoch: int) -> Schedule:
    """The schedule of a run whose updates are on `batch_size` images."""
    return Schedule(
        rate=settings.rate * batch_size / RATE_BATCH,
        final_rate=settings.final_rate,
        warmup_steps=round(settings.warmup_epochs * steps_per_epoch),
        total_steps=epochs * steps_per_epoch,
    )


def set_rate(optimiser: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    """Give every group its rate of the step; returns the scheduled one."""
    rate = schedule.at(step)
    constant = rate if step < schedule.warmup_steps else schedule.rate
    for group in optimiser.param_groups:
        group["lr"] = constant if group["constant_rate"] else rate
    return rate


def build(settings: Optimiser, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser over a method's parameter groups; `set_rate` gives it its rate.

    Args:
        settings: What to build.
        groups: `params`, and `constant_rate: True` where the group keeps the schedule's rate without its decline.
    """
    constructor, _ = OPTIMISERS[settings.name]
    split = [part for group in groups for part in _by_decay({"constant_rate": False, **group}, settings)]
    return constructor(split, lr=0.0, **settings.options)


def _by_decay(group: dict[str, Any], settings: Optimiser) -> list[dict[str, Any]]:
    parameters = list(group["params"])
    plain = [] if settings.decay_norm_and_bias else [p for p in parameters if p.ndim <= 1]
    decayed = parameters if settings.decay_norm_and_bias else [p for p in parameters if p.ndim > 1]
    parts = [
        {**group, "params": decayed, "weight_decay": settings.weight_decay, "adapted": True},
        {**group, "params": plain, "weight_decay": 0.0, "adapted": False},
    ]
    return [part for part in parts if part["params"]]


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a local rate for each parameter tensor (LARS, arXiv 1708.03888).

    Unlike the paper's algorithm 1, and like torch's SGD, the global rate is outside the momentum buffer.

    The local rate trust · ‖w‖ / (‖g‖ + weight_decay · ‖w‖) multiplies g + weight_decay · w before the momentum. Where
    ‖w‖ or ‖g‖ is zero, and in groups with `adapted: False`, it is 1. Parameters without gradient stay as they are.

    Args:
        params: Parameters or groups.
        lr: Global learning rate.
        momentum: Share of the last step that is kept.
        trust: The trust coefficient, η.
        weight_decay: Of groups that do not state their own.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float,
        trust: float,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay, "adapted": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one update."""
        assert closure is None, "a closure is not supported"
        for group in self.param_groups:
            moving = [(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None]
            if moving:
                self._step([parameter for parameter, _ in moving], [gradient for _, gradient in moving], group)

    def _step(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        updates = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        if group["adapted"]:
            # The norms stay on the device: one vector for all tensors, no synchronisation for any.
            weight_norms = torch.stack(torch._foreach_norm(parameters))
            gradient_norms = torch.stack(torch._foreach_norm(gradients))
            local = group["trust"] * weight_norms
            local = local / (gradient_norms + group["weight_decay"] * weight_norms + _EPSILON)
            local = torch.where((weight_norms > 0) & (gradient_norms > 0), self._limited(local, group["lr"]), 1.0)
            torch._foreach_mul_(updates, list(local.unbind()))
        torch._foreach_add_(parameters, self._with_momentum(parameters, updates, group["momentum"]), alpha=-group["lr"])

    def _limited(self, local: Tensor, rate: float) -> Tensor:
        return local

    def _with_momentum(
        self, parameters: list[Tensor], updates: list[Tensor] | tuple[Tensor, ...], momentum: float
    ) -> list[Tensor]:
        new = [parameter for parameter in parameters if "momentum_buffer" not in self.state[parameter]]
        for parameter in new:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, updates)
        return buffers


class LARC(LARS):
    """LARS whose local rate, times the global one, never exceeds the latter: min(local / lr, 1) in place of local."""

    def _limited(self, local: Tensor, rate: float) -> Tensor:
        return (local / rate).clamp(max=1.0)


OPTIMISERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], set[str]]] = {
    "sgd": (torch.optim.SGD, {"momentum"}),
    "lars": (LARS, {"momentum", "trust"}),
    "larc": (LARC, {"momentum", "trust"}),
    "adamw": (torch.optim.AdamW, {"betas"}),
}
"""Constructor and options of each optimiser."""
