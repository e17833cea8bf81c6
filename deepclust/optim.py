"""The optimiser and its schedule, a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a cosine.

    Attributes:
        rate: Learning rate after the warm-up.
        final_rate: Share of `rate` that is left at the last step.
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


def sgd(groups: list[dict[str, Any]], *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD over parameter groups. A group with `constant_rate: True` keeps the schedule's rate without its decline."""
    return torch.optim.SGD(
        [{"constant_rate": False, **group} for group in groups], lr=0.0, momentum=momentum, weight_decay=weight_decay
    )


def set_rate(optimiser: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    """Give every group its rate of the step; returns the scheduled one."""
    rate = schedule.at(step)
    for group in optimiser.param_groups:
        group["lr"] = schedule.rate if group["constant_rate"] else rate
    return rate
