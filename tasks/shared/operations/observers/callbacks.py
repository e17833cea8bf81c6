"""What observes a training run: probe, watchdog, and the encoder of the last good epoch in case the run fails.

It writes to MLflow, to the terminal and under state/, and can stop a run, but never changes an output.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepclust.errors import TrainingError
from deepclust.evaluation import watchdog
from deepclust.methods.parts.base import Method
from deepclust.models import encoder
from deepclust.training import loop
from tasks.shared.operations.observers import probe
from tasks.shared.operations.text import warn
from tasks.shared.outputs import layout, stage

_RUN = "run"  # file beside the encoder that is kept: name of the run that it is of


class Watch:
    """Observes the run of one stage.

    Args:
        here: The stage.
        method: The method in training.
        trained: The encoder around its backbone.
        images: (N, H, W, C) uint8, what it is trained on.
        normalise: Applied to crops before the network sees them.
        device: Of method and encoder.
        run: Name of the run.
        fresh: Whether the run begins rather than goes on.
    """

    def __init__(
        self,
        here: stage.Here,
        method: Method,
        trained: encoder.Encoder,
        images: NDArray[np.uint8],
        *,
        normalise: loop.Normalise,
        device: torch.device,
        run: str,
        fresh: bool,
    ) -> None:
        assert here.encoder
        self._here = here
        self._trained = trained
        self._dog = watchdog.Watchdog(method, images, normalise=normalise, device=device, seed=here.params.seed)
        self._probe = probe.Probe(here.run, here.encoder, trained, device)
        self._folder = layout.last_good(here.encoder)
        self._run = run
        self._good = 0
        self._logged: list[tuple[loop.Epoch, dict[str, float]]] = []
        if fresh:
            self.clear()

    def step(self, done: loop.Step) -> None:
        """Note an update."""
        self._dog.step(done)

    def epoch(self, done: loop.Epoch, means: dict[str, float]) -> None:
        """Log an epoch with the means over its steps, and warn of what is wrong with it.

        Raises:
            TrainingError: If something is wrong and params.yaml says `watchdog: stop`.
        """
        report = self._dog.epoch(done)
        for alarm in report.alarms:
            warn(f"epoch {done.epoch + 1}: {alarm.message}")
        self._logged.append((done, self._probe(done, means | report.indicators)))
        if not report.alarms:
            self._keep(done.epoch + 1)
            return
        self._here.run.set_tags({"watchdog": ", ".join(alarm.symptom for alarm in report.alarms)})
        if self._here.params.pretrain.watchdog == "stop":
            raise TrainingError(f"stopped by the watchdog after epoch {done.epoch + 1}: {report.alarms[0].message}")

    def state_dict(self) -> dict[str, Any]:
        """What it has seen and logged."""
        logged = [[asdict(done), values] for done, values in self._logged]
        return {"dog": self._dog.state_dict(), "good": self._good, "logged": logged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; the epochs so far are logged again, into the run of this attempt."""
        self._dog.load_state_dict(state["dog"])
        owner = self._folder / _RUN  # another run may have kept its encoder in between
        self._good = state["good"] if owner.exists() and owner.read_text(encoding="utf-8") == self._run else 0
        self._logged = [(loop.Epoch(**done), values) for done, values in state["logged"]]
        for done, values in self._logged:
            self._here.run.log_metrics(values, step=done.epoch + 1)

    def kept(self) -> str:
        """Where the last good encoder is, for a message."""
        if not self._good:
            return "no epoch was good, so no encoder is kept"
        return f"the encoder after epoch {self._good} is kept in {self._folder}"

    def clear(self) -> None:
        """Forget what was kept: a new run begins, or this one has ended well."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _keep(self, epochs: int) -> None:
        partial = self._folder.with_name(f".{self._folder.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            encoder.save(self._trained, partial, epochs=epochs)
            (partial / _RUN).write_text(self._run, encoding="utf-8")
            self.clear()
            partial.rename(self._folder)
            self._good = epochs
        except OSError as error:  # not worth ending the training for
            shutil.rmtree(partial, ignore_errors=True)
            warn(f"the encoder of epoch {epochs} could not be kept ({error})")
