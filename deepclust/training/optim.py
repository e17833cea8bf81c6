"""The optimisers by name, the groups of parameters they treat alike, and the schedule, a pure function of the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from deepclust.config import BY_NAME, Config, Flag, Fraction, NotNegative, Positive, Share, config

Precision = Literal["float32", "bf16", "fp16"]
RATE_BATCH = 256  # images of the update that a stated rate is for


@config
class OptimiserConfig(Config, ABC):
    """What all optimisers share: for each step, a rate of a linear warm-up and then of a cosine."""

    rate: Positive = 0.05
    """Learning rate after the warm-up, for 256 images an update; scaled linearly by batch_size (arXiv 1706.02677)."""
    weight_decay: NotNegative = 1e-4
    """Weight decay; decoupled in AdamW, part of the gradient elsewhere."""
    decay_norm_and_bias: Flag = True
    """Whether parameters of one dimension decay too; if not, LARS and LARC do not adapt their rate either."""
    clip_norm: Positive | None = None
    """Largest norm of the whole gradient; null leaves it as it is."""
    warmup_epochs: NotNegative = 0.0
    """Epochs of a linear warm-up."""
    final_rate: Share = 0.0
    """Share of the rate that the cosine ends at."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """torch's optimiser over groups that each state their weight decay."""


@config
class SGD(OptimiserConfig):
    """SGD with momentum."""

    name: Literal["sgd"] = "sgd"
    """Which optimiser."""
    momentum: Fraction = 0.9
    """Share of the last step that is kept."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See the base class."""
        return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum)


@config
class LARS(OptimiserConfig):
    """SGD with a trust ratio for each parameter (arXiv 1708.03888); LARC's never exceeds SGD's own rate.

    The global rate is outside the momentum buffer, as in torch's SGD and unlike the paper's algorithm 1.
    """

    name: Literal["lars", "larc"] = "lars"
    """Which optimiser."""
    momentum: Fraction = 0.9
    """Share of the last step that is kept."""
    trust: Positive = 0.001
    """Trust coefficient η."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See the base class."""
        from timm.optim.lars import Lars  # seconds, as it loads all of timm

        clip = self.name == "larc"
        made: torch.optim.Optimizer = Lars(
            groups, lr=0.0, momentum=self.momentum, trust_coeff=self.trust, trust_clip=clip
        )
        return made


@config
class AdamW(OptimiserConfig):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    """Which optimiser."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See the base class."""
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas)


Optimiser = Annotated[SGD | LARS | AdamW, BY_NAME]


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


def schedule(settings: OptimiserConfig, *, batch_size: int, epochs: int, steps_per_epoch: int) -> Schedule:
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


def build(settings: OptimiserConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser over a method's parameter groups; `set_rate` gives it its rate.

    Args:
        settings: What to build.
        groups: `params`, and `constant_rate: True` where the group keeps the schedule's rate without its decline.
    """
    return settings.build([part for group in groups for part in _by_decay({"constant_rate": False, **group}, settings)])


def _by_decay(group: dict[str, Any], settings: OptimiserConfig) -> list[dict[str, Any]]:
    """Norms and biases apart where they do not decay; `always_adapt` is read by LARS and LARC alone."""
    parameters = list(group["params"])
    plain = [] if settings.decay_norm_and_bias else [parameter for parameter in parameters if parameter.ndim <= 1]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1] if plain else parameters
    parts = [
        {**group, "params": decayed, "weight_decay": settings.weight_decay, "always_adapt": True},
        {**group, "params": plain, "weight_decay": 0.0, "always_adapt": False},
    ]
    return [part for part in parts if part["params"]]
