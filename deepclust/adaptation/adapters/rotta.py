"""RoTTA: Robust Test-Time Adaptation in Dynamic Scenarios (arXiv 2303.13899, CVPR 2023).

A teacher predicts. Images go to a memory that is balanced by predicted class and prefers recent, certain ones; every so
many images a student learns from the memory what the teacher says of it, and the teacher follows slowly. BatchNorm
normalises with moving statistics, which only the memory changes: any batch size will do. Deliberately different:
- the student's view is that of `views.view`; the paper's augmentation assumes colour photographs in [0, 1];
- any BatchNorm takes part, whatever it does after normalising, and affine parameters of LayerNorm, GroupNorm and
  InstanceNorm learn too, so that transformers can be adapted; the code's are those of BatchNorm1d and BatchNorm2d;
- dropout stays off; in the code teacher and student are in train mode while they learn;
- the entropy that ranks the memory is that of p; the code's has log(p + 1e-6);
- `steps` counts gradient steps per update, and `reset()` empties the memory too.

Shapes: B images, C classes or channels, M members of the memory.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepclust.adaptation.adapters.tent import entropy
from deepclust.adaptation.base import BATCH_STATISTICS, Learner, LearnerConfig, check_logits, check_shapes, copy_into
from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.normalisation import batch_norms, renormalise, statistics
from deepclust.adaptation.parameters import select_parameters
from deepclust.adaptation.views import view
from deepclust.config import Count, Flag, Natural, NotNegative, Positive, Share, config
from deepclust.errors import AdaptationError


@config
class Config(LearnerConfig):
    """RoTTA's options."""

    rate: Positive = 1e-3
    """Adam's rate; the paper's."""
    steps: Count = 1
    """Gradient steps an update; the teacher's prediction is from before or after the updates that a batch brings."""
    memory_size: Count = 64
    """N, the most images that the memory holds."""
    update_frequency: Count = 64
    """Images between two updates."""
    alpha: Share = 0.05
    """α, the share of the memory's statistics in BatchNorm's at each step."""
    nu: Share = 1e-3
    """ν, the share of the student in the teacher at each step."""
    lambda_t: NotNegative = 1.0
    """Weight of the age in what leaves the memory."""
    lambda_u: NotNegative = 1.0
    """Weight of the uncertainty in what leaves the memory."""
    flip: Flag = True
    """Whether the student's view may be flipped left to right; not for digits and letters."""
    seed: Natural = 0
    """Of the student's views."""

    @property
    def passes(self) -> float:
        """As of every adapter: the teacher's answer, and the steps of student and teacher on the memory."""
        answers = 2.0 if self.predict == "after" else 1.0
        step = self.step_passes + BATCH_STATISTICS
        return answers + self.steps * step * self.memory_size / self.update_frequency


class Member(NamedTuple):
    """An image in the memory.

    Attributes:
        image: (…), without the batch's dimension.
        label: The class that the teacher saw in it when it came.
        uncertainty: Entropy in nats of the teacher's prediction then.
        age: Images that have come since, itself included.
    """

    image: Tensor
    label: int
    uncertainty: float
    age: int


def removal_score(member: Member, *, capacity: int, classes: int, lambda_t: float, lambda_u: float) -> float:
    """How much the memory wants to be rid of a member: high if old and uncertain."""
    old = 1 / (1 + math.exp(-member.age / capacity))
    return lambda_t * old + lambda_u * member.uncertainty / math.log(classes)


def remember(
    memory: list[Member], newcomer: Member, *, capacity: int, classes: int, score: Callable[[Member], float]
) -> list[Member]:
    """The memory after an image has come, oldest member first; all of them a time step older.

    While there is room in its class and in the memory the newcomer enters. Otherwise it replaces the member with the
    highest score of its own class, if that one is full, or of the largest classes, unless it scores as high itself. Of
    equal scores the oldest goes. No class holds more than its share of the capacity, rounded up.
    """
    counts = Counter(member.label for member in memory)
    rivals: list[Member] = []
    if counts[newcomer.label] >= capacity / classes:
        rivals = [member for member in memory if member.label == newcomer.label]
    elif len(memory) >= capacity:
        rivals = [member for member in memory if counts[member.label] == max(counts.values())]
    worst = max(rivals, key=score, default=None)
    if worst is None:
        memory = [*memory, newcomer]
    elif score(worst) > score(newcomer):
        memory = [*(member for member in memory if member is not worst), newcomer]
    return [member._replace(age=member.age + 1) for member in memory]


@contextmanager
def robust_statistics(model: nn.Module, alpha: float) -> Iterator[None]:
    """While it lasts each batch moves BatchNorm's running statistics, which normalise it; the model is in eval mode.

    Args:
        model: Changed in place; outside of the context its running statistics only normalise.
        alpha: α, the share of the batch's statistics.
    """
    handles = [norm.register_forward_pre_hook(partial(_move, alpha)) for norm in batch_norms(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _move(alpha: float, norm: _BatchNorm, given: tuple[Tensor, ...]) -> tuple[Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean_C, variance_C = statistics(given[0])
    mean_C = (1 - alpha) * norm.running_mean + alpha * mean_C
    variance_C = (1 - alpha) * norm.running_var + alpha * variance_C
    # New tensors, not in place: a layer that is used twice needs its earlier statistics for the gradient.
    norm.running_mean, norm.running_var = mean_C.detach(), variance_C.detach()
    # Changes no value any more, but the gradient passes through the batch's statistics.
    return (renormalise(norm, given[0], mean_C, variance_C),)


class RoTTA(Learner):
    """Learns from a balanced memory of the stream; made for domains that change and labels that are correlated.

    Nothing changes before `update_frequency` images have come; with `episodic` a smaller batch changes nothing at all.
    Neither memory nor time grow along a stream.

    Attributes:
        model: The student.
        teacher: The model that predicts.
        memory: The memory's members, oldest first.
    """

    name = "rotta"
    config_class = Config
    config: Config
    _in_place = (*Learner._in_place, "teacher", "teacher_buffers")
    _by_steps = (*Learner._by_steps, "teacher")
    teacher: Classifier
    memory: list[Member]

    def _check_model(self, model: Classifier) -> None:
        super()._check_model(model)
        if any(norm.running_mean is None or norm.running_var is None for norm in batch_norms(model)):
            raise AdaptationError(
                "rotta moves BatchNorm's running statistics, and this model has a BatchNorm layer without any; "
                "train it with track_running_stats, or use another adapter"
            )

    def _check_batch(self, images: Tensor) -> None:
        """Moving statistics take any batch."""

    def _configure(self, model: Classifier) -> Classifier:
        return self._learn_only(model.eval())

    def _start(self) -> None:
        super()._start()
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self._following = select_parameters(self.teacher, self.config.parameters)
        self.memory = []
        self._seen = 0
        self._generator = torch.Generator().manual_seed(self.config.seed)

    def _can_fail_late(self, images: Tensor) -> bool:
        frequency = self.config.update_frequency
        updates = (self._seen + len(images)) // frequency - self._seen // frequency
        return super()._can_fail_late(images) or updates > 1

    def _adapt(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            logits_BC: Tensor = self.teacher(images)
        check_logits(logits_BC, name=self.name, remedy=self._remedy)
        labels, uncertainties = logits_BC.argmax(dim=1).tolist(), entropy(logits_BC).tolist()
        its, capacity, classes = self.config, self.config.memory_size, logits_BC.shape[1]
        score = partial(removal_score, capacity=capacity, classes=classes, lambda_t=its.lambda_t, lambda_u=its.lambda_u)
        for image, label, uncertainty in zip(images, labels, uncertainties, strict=True):
            newcomer = Member(image.detach().clone(), label, uncertainty, age=0)
            self.memory = remember(self.memory, newcomer, capacity=capacity, classes=classes, score=score)
            self._seen += 1
            if self._seen % its.update_frequency == 0:
                remembered = torch.stack([member.image for member in self.memory])
                for _ in range(its.steps):
                    self._step(remembered)
        if its.predict == "before":
            return logits_BC
        with torch.no_grad():
            after: Tensor = self.teacher(images)
        return after

    def _loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of the memory: the mean of E(a) · H(teacher(x), student(view(x))), with E(a) = e⁻ᵃ / (1 + e⁻ᵃ)."""
        its = self.config
        ages_M = torch.tensor([member.age for member in self.memory], dtype=images.dtype, device=images.device)
        with torch.no_grad(), robust_statistics(self.teacher, its.alpha):
            taught_MC: Tensor = self.teacher(images)
        with robust_statistics(self.model, its.alpha):
            log_p_MC = self.model(view(images, generator=self._generator, flip=its.flip)).log_softmax(dim=1)
        divergence_M = -(taught_MC.softmax(dim=1) * log_p_MC).sum(dim=1)
        return log_p_MC, (torch.sigmoid(-(ages_M / its.memory_size)) * divergence_M).mean()

    @torch.no_grad()
    def _step(self, images: Tensor) -> Tensor:
        """Teach the student the memory, and let the teacher follow: θ ← (1 − ν) θ + ν θ_student."""
        log_p_MC = super()._step(images)
        for name, parameter in self._following.items():
            parameter.lerp_(self._learning[name], self.config.nu)
        return log_p_MC

    def _state(self) -> dict[str, Any]:
        return super()._state() | {
            "teacher": {name: parameter.detach() for name, parameter in self._following.items()},
            "teacher_buffers": dict(self.teacher.named_buffers()),
            "memory": [member._asdict() for member in self.memory],
            "seen": self._seen,
            "generator": self._generator.get_state(),
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        super()._check_state(state)
        own, size = self._state(), self.config.memory_size
        for kind in ("teacher", "teacher_buffers"):
            check_shapes(own[kind], state[kind])
        if len(state["memory"]) > size:
            raise AdaptationError(
                f"expected a state with at most {size} images in the memory, got {len(state['memory'])}; "
                "load it into an adapter of the memory_size it was saved from"
            )

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        copy_into(self._following, state.get("teacher", {}))
        copy_into(dict(self.teacher.named_buffers()), state["teacher_buffers"])
        members = [Member(**member) for member in state["memory"]]
        self.memory = [member._replace(image=member.image.to(self.device)) for member in members]
        self._seen = state["seen"]
        self._generator.set_state(state["generator"].cpu())
