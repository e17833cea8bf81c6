"""A run that can be killed at any moment: what is saved, when, and how it goes on.

The order of the images, their views and every other draw are functions of seed and step (seeding.py), so there is no
random state to keep: the number of updates made says it for every process and device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deepclust import distributed
from deepclust.errors import CheckpointError, PreemptedError
from deepclust.training import checkpoint


class Stateful(Protocol):
    """Something with a state of tensors, numbers and text."""

    def state_dict(self) -> Any:
        """Its state."""

    def load_state_dict(self, state: Any) -> Any:
        """Take over a state."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Where a run's state is kept, and how often it is saved.

    Attributes:
        store: The checkpoints of this very run.
        found: Gives the one to go on from, or None; called once.
        every_steps: Updates from one checkpoint to the next at most, or None.
        every_seconds: Seconds from one to the next at most, or None; the main process's clock decides.
        parts: What else belongs to the state, on the main process.
        stop: Whether this process was told to stop: all then save and end with PreemptedError.
    """

    store: checkpoint.Store
    found: Callable[[], checkpoint.Saved | None]
    every_steps: int | None
    every_seconds: float | None
    parts: Mapping[str, Stateful]
    stop: Callable[[], bool]


class Keeper:
    """Saves and restores one run; without `saving` it does nothing.

    Args:
        saving: Where and how often.
        state: What the run consists of on every process.
    """

    def __init__(self, saving: Saving | None, state: Mapping[str, Stateful]) -> None:
        self._saving = saving
        self._state = state
        self._saved_at = time.monotonic()
        self._saved_step = 0

    def restore(self) -> int:
        """Take over the newest checkpoint, if there is one.

        Returns:
            Number of updates made so far.

        Raises:
            CheckpointError: If the processes do not find the same one.
        """
        if self._saving is None:
            return 0
        found = self._saving.found()
        step = found.step if found else 0
        newest, oldest = distributed.all_max(torch.tensor([step, -step])).tolist()
        if newest != -oldest:
            raise CheckpointError(
                f"expected all processes to find the same checkpoint, got one after update {newest} and one after "
                f"update {-oldest}; put the state folder where all machines see it"
            )
        if found:
            if found.processes != distributed.processes() and distributed.is_main():
                print(
                    f"note: the checkpoint is of {found.processes} process(es), now there are "
                    f"{distributed.processes()}: the same images and views, but other rounding (and dropout)",
                    flush=True,
                )
            for name, part in self._state.items():
                part.load_state_dict(found.state["run"][name])
            if distributed.is_main():
                for name, part in self._saving.parts.items():
                    part.load_state_dict(found.state["parts"][name])
        self._saved_step = step
        return step

    def wishes(self, step: int) -> Tensor:
        """What this process wants after the update `step`, (2,) above 0 where it does: a checkpoint; to stop.

        The mean of all processes' goes to `after`.
        """
        if self._saving is None:
            return torch.zeros(2)
        waited = time.monotonic() - self._saved_at
        made = step + 1 - self._saved_step
        due = made >= (self._saving.every_steps or math.inf) or waited >= (self._saving.every_seconds or math.inf)
        return torch.tensor([float(due and distributed.is_main()), float(self._saving.stop())])

    def after(self, step: int, wishes: list[float]) -> None:
        """Do what one of the processes wanted, once update `step` and what follows from it is done.

        Raises:
            PreemptedError: When the state is saved and the run is to stop.
            CheckpointError: If it cannot be saved.
        """
        save, stop = (wish > 0 for wish in wishes)
        if self._saving is None or not (save or stop):
            return
        with distributed.together():
            if distributed.is_main():
                state = {
                    "run": {name: part.state_dict() for name, part in self._state.items()},
                    "parts": {name: part.state_dict() for name, part in self._saving.parts.items()},
                }
                self._saving.store.save(step + 1, state, processes=distributed.processes())
        self._saved_at, self._saved_step = time.monotonic(), step + 1
        if stop:
            raise PreemptedError(
                f"stopped after update {step + 1}, whose state is kept; run it again to go on from there"
            )
