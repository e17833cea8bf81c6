"""Notices while a method trains that it diverges or collapses, and names the published remedy.

Weights, running statistics, modes and generators stay as they were. No indicator needs labels, and no threshold was
fitted to labels: each lies between the values of healthy and of broken runs, with a margin on both sides. The curves of
both are in the methods' pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust import seeding
from deepclust.errors import DataError
from deepclust.evaluation import metrics
from deepclust.methods.parts.base import Method
from deepclust.models import features
from deepclust.training.loop import Epoch, Normalise, Step

SAMPLE = 512  # images that are embedded each epoch
RECENT = 50  # last steps of an epoch that its indicators average
_BATCH = 128

# Grey levels, of 255. Sensor noise and compression leave about one; clothes on black (Fashion-MNIST) vary by 71.
SAME_IMAGES = 2.0
FLAT_IMAGE = 2.0
# Share of the images that are flat. A few blank ones are in many a data set; from half on they decide what is learnt.
FLAT_IMAGES = 0.5
# fp16 leaves out one update in 2,000, and some of the first ones. Most of them is a run that stands still.
NON_FINITE_STEPS = 0.5
# Growth of the weights within an epoch. Under batch normalisation ‖w‖⁴ grows by a term in rate² · steps (arXiv
# 1706.05350): healthy runs end their epochs at 1.0 to 1.75, those at a rate 100 times too large at 2.3 to 30.
WEIGHT_GROWTH = 2.0
# Loss over its first value, or over that of a model that knows nothing where that is larger. Healthy runs are at most
# at 1; SwAV at a rate 100 times too large is at 1.4 to 2.1: the weights move faster than anything can be learnt.
LOSS_RISE = 1.2
# Healthy: .25 to .8, where the mean embedding is far from zero; collapsed: towards 0.
EMBEDDING_SPREAD = 0.1
# SimSiam's embeddings come out of batch normalisation, so their spread starts at 1 and cannot vanish at once. Healthy:
# .93 to .99; without stop-gradient .65 to .77 after two short epochs, and falling (arXiv 2011.10566, figure 2).
NORMALISED_SPREAD = 0.85
# Effective dimensions of the features: 14 to 60 of 128 in healthy runs from the first epoch on, 1 to 2 in collapsed, 2
# to 6 at a rate 100 times too large.
RANKME = 5.0
RANKME_FROM_IMAGES = 20  # healthy features of fewer have a small rank too
# Share of the prototypes that are used. Healthy: .6 to 1. Sinkhorn balances the codes, so a fifth is far from it.
PROTOTYPES_USED = 0.2
# Entropy of a code over that of a uniform one. Healthy: .75 to .91 at epsilon .05, .07 to .5 at .001, whose hard codes
# are no fault by themselves. At epsilon .3 and more it is 1, and the loss stays at ln K.
CODE_ENTROPY = 0.98
# Distance of loss_to_chance from 1, where a run that learns nothing stays to three digits. Healthy ones: .05 after
# forty steps; where labels change each epoch (DeepCluster-v2), the ratio may pass through 1, but does not stay.
LOSS_FROM_CHANCE = 0.01
# Steps at the full rate before a method must have learnt something: those of the warm-up do not count.
PATIENCE = 100


@dataclass(frozen=True)
class Alarm:
    """A symptom, and by which indicator it shows.

    Attributes:
        symptom: What is wrong, in the field's term.
        indicator: Name of the indicator.
        message: One line: symptom, number, bound, remedy.
    """

    symptom: str
    indicator: str
    message: str


@dataclass(frozen=True)
class Report:
    """What an epoch looked like: indicators by name, and alarms, the root cause first."""

    epoch: int
    indicators: dict[str, float]
    alarms: list[Alarm]


@dataclass(frozen=True)
class _Rule:
    symptom: str
    indicator: str
    _: KW_ONLY
    above: float = math.inf
    below: float = -math.inf
    remedy: str
    patience: int = 0
    of: str = ""

    def judge(self, method: Method, indicators: dict[str, float], steps: int) -> Alarm | None:
        """An alarm if the indicator is known and out of its bounds, after `steps` at the full rate."""
        value = indicators.get(self.indicator)
        if value is None or steps < self.patience or self.of not in ("", method.name):
            return None
        if self.below <= value <= self.above:
            return None
        side, bound = ("above", self.above) if value > self.above else ("below", self.below)
        message = f"{self.symptom}: {self.indicator} {value:.3g}, {side} {bound:g}; {self.remedy}"
        return Alarm(self.symptom, self.indicator, message)


_SMALLER_RATE = "lower optimiser.rate or lengthen the warm-up"
_ASYMMETRY = "check the stop-gradient, the predictor and its rate, or lower optimiser.rate"
_CODES = (
    "lower epsilon (0.03), freeze the prototypes for longer, assign hard at the start, start the queue later or "
    "shorten it, or lower optimiser.rate"
)
_LOOK = "look at the images: nothing can be learnt from these"

# The order is that of causes: what stands above brings about what stands below. Of a symptom, the first rule speaks.
_RULES: Sequence[_Rule] = (
    _Rule("constant images", "image_variation", below=SAME_IMAGES, remedy=f"all are alike; {_LOOK}"),
    _Rule("constant images", "flat_images", above=FLAT_IMAGES, remedy=f"each is one flat colour; {_LOOK}"),
    _Rule("non-finite", "non_finite_features", above=0.0, remedy=_SMALLER_RATE),
    _Rule("non-finite", "non_finite_steps", above=NON_FINITE_STEPS, remedy=f"{_SMALLER_RATE}, or use bf16 or float32"),
    _Rule("diverging", "weight_growth", above=WEIGHT_GROWTH, remedy=_SMALLER_RATE),
    _Rule("diverging", "loss_rise", above=LOSS_RISE, remedy=_SMALLER_RATE),
    _Rule("representation collapse", "embedding_spread", below=NORMALISED_SPREAD, remedy=_ASYMMETRY, of="simsiam"),
    _Rule("representation collapse", "embedding_spread", below=EMBEDDING_SPREAD, remedy=_SMALLER_RATE),
    _Rule("representation collapse", "rankme", below=RANKME, remedy=_SMALLER_RATE),
    _Rule("prototype collapse", "code_entropy", above=CODE_ENTROPY, remedy=_CODES, patience=PATIENCE),
    _Rule("prototype collapse", "prototypes_used", below=PROTOTYPES_USED, remedy=_CODES, patience=PATIENCE, of="swav"),
    _Rule("prototype collapse", "prototypes_used", below=PROTOTYPES_USED, remedy=_SMALLER_RATE, patience=PATIENCE),
    _Rule("loss at ln K", "loss_from_chance", below=LOSS_FROM_CHANCE, remedy=_CODES, patience=PATIENCE, of="swav"),
    _Rule("loss at ln K", "loss_from_chance", below=LOSS_FROM_CHANCE, remedy=_SMALLER_RATE, patience=PATIENCE),
)


class Watchdog:
    """Watches one training run; give `step` and `epoch` what `training.train` reports.

    Args:
        method: The method in training.
        images: (N, H, W, C) uint8 training images, or held-out ones.
        normalise: Applied to images (batch, C, H, W) in [0, 1] before the backbone sees them.
        device: Where the method is.
        seed: Decides the sample of at most `SAMPLE` images.
    """

    def __init__(
        self, method: Method, images: NDArray[np.uint8], *, normalise: Normalise, device: torch.device, seed: int
    ) -> None:
        self._method = method
        self._normalise = normalise
        self._device = device
        drawn = torch.randperm(len(images), generator=seeding.generator(seed, "watchdog"))[:SAMPLE]
        self._sample = images[drawn.sort().values.numpy()]
        self._of_images = _of_images(self._sample)
        # Those that train from the start on: prototypes that are frozen for a while remain among them.
        self._weights: list[Tensor] = [w for w in method.parameters() if w.requires_grad and w.ndim > 1]
        self._norms = self._weight_norms()
        self._steps: list[Step] = []
        self._start: float | None = None
        self._largest_rate = 0.0
        self._steps_at_rate = 0

    def step(self, done: Step) -> None:
        """Note an update."""
        if self._start is None:
            self._start = max(1.0, done.logged.get("loss_to_chance", 1.0))
        # In the warm-up each rate is above all before it.
        self._steps_at_rate += done.rate <= self._largest_rate
        self._largest_rate = max(self._largest_rate, done.rate)
        self._steps.append(done)

    def state_dict(self) -> dict[str, Any]:
        """What it has seen of the run so far."""
        return {
            "norms": self._norms,
            "start": self._start,
            "largest_rate": self._largest_rate,
            "steps_at_rate": self._steps_at_rate,
            "steps": [asdict(step) for step in self._steps],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._norms = state["norms"]
        self._start = state["start"]
        self._largest_rate = state["largest_rate"]
        self._steps_at_rate = state["steps_at_rate"]
        self._steps = [Step(**step) for step in state["steps"]]

    def epoch(self, done: Epoch) -> Report:
        """Judge the epoch whose steps were noted since the last one.

        The indicators, where the method has what they need:
        - `loss`, `gradient_norm`, the method's scalars: means over the finite values of the epoch's last steps;
        - `loss_rise`: `loss_to_chance` over its value in the run's first step, or over 1 if that is larger;
        - `loss_from_chance`: distance of `loss_to_chance` from 1, the larger one of the last steps' two halves;
        - `non_finite_steps`: share of the steps with a number that is not finite;
        - `weight_growth`: geometric mean of the growth of matrices and kernels within the epoch;
        - `rankme` of the backbone's features of the sample, in eval mode, if it has at least 20 images;
          `non_finite_features`: 1 where there are such, and then no `rankme`;
        - `image_variation` from one image of the sample to the next, in grey levels; `flat_images`: share that is flat.
        """
        before, self._norms = self._norms, self._weight_norms()
        indicators = {
            **self._of_images,
            **_of_steps(self._steps, start=self._start or 1.0),
            **self._of_features(),
            "weight_growth": float((self._norms.log() - before.log()).mean().exp()),
        }
        self._steps = []
        alarms: dict[str, Alarm] = {}
        for rule in _RULES:
            alarm = rule.judge(self._method, indicators, self._steps_at_rate)
            if alarm is not None:
                alarms.setdefault(alarm.symptom, alarm)
        return Report(done.epoch, indicators, list(alarms.values()))

    @torch.no_grad()
    def _weight_norms(self) -> Tensor:
        # By tensor, so that no large one of constant norm (unit prototypes) hides the others.
        return torch.stack(torch._foreach_norm(self._weights)).cpu().double().clamp(min=1e-12)

    def _of_features(self) -> dict[str, float]:
        backbone = self._method.backbone
        modes = {module: module.training for module in backbone.modules()}
        backbone.eval()
        try:
            rows = features.extract(
                lambda batch: backbone(self._normalise(batch)), self._sample, batch_size=_BATCH, device=self._device
            )
        except DataError:  # what it says of features that are not finite
            return {"non_finite_features": 1.0}
        finally:
            for module, training in modes.items():
                module.training = training
        rank = {"rankme": metrics.rankme(rows)} if len(rows) >= RANKME_FROM_IMAGES else {}
        return {"non_finite_features": 0.0} | rank


def _of_images(images: NDArray[np.uint8]) -> dict[str, float]:
    """How much the images (N, H, W, C) vary from one to the next, and how many of them do not vary inside."""
    grey = images.astype(np.float32)
    return {
        "image_variation": float(grey.std(axis=0).mean()),
        "flat_images": float((grey.std(axis=(1, 2)).max(axis=1) < FLAT_IMAGE).mean()),
    }


def _of_steps(steps: Sequence[Step], *, start: float) -> dict[str, float]:
    """Means of the last steps' finite numbers, and the share of all steps that have others."""
    numbers = [{"loss": step.loss, "gradient_norm": step.gradient_norm, **step.logged} for step in steps]
    finite = [{name: value for name, value in row.items() if math.isfinite(value)} for row in numbers]
    left_out = sum(len(row) < len(all_) for row, all_ in zip(finite, numbers, strict=True))
    recent = finite[-RECENT:]
    names = {name for row in recent for name in row}
    means = {name: fmean(row[name] for row in recent if name in row) for name in sorted(names)}
    means["non_finite_steps"] = left_out / max(1, len(steps))
    ratios = [row["loss_to_chance"] for row in recent if "loss_to_chance" in row]
    if len(ratios) > 1:
        half = len(ratios) // 2
        means["loss_rise"] = means["loss_to_chance"] / start
        means["loss_from_chance"] = max(abs(1 - fmean(part)) for part in (ratios[:half], ratios[half:]))
    return means
