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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepclust.adaptation.adapters.tent import entropy
from deepclust.adaptation.base import Learner, Predict, check_shapes, descend, learn_only
from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.normalisation import batch_norms, check_trained_statistics, renormalise, statistics
from deepclust.adaptation.parameters import AFFINE_NORMS, Parameters, select_parameters
from deepclust.adaptation.views import view
from deepclust.errors import AdaptationError


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


def removal_score(
    age: int, uncertainty: float, *, capacity: int, classes: int, lambda_t: float, lambda_u: float
) -> float:
    """How much the memory wants to be rid of a member: high if old and uncertain."""
    return lambda_t / (1 + math.exp(-age / capacity)) + lambda_u * uncertainty / math.log(classes)


def remember(
    memory: list[Member], newcomer: Member, *, capacity: int, classes: int, lambda_t: float, lambda_u: float
) -> list[Member]:
    """The memory after an image has come, oldest member first; all of them a time step older.

    While there is room in its class and in the memory the newcomer enters. Otherwise it replaces the member with the
    highest removal score of its own class, if that one is full, or of the largest classes, unless it scores as high
    itself. Of equal scores the oldest goes. No class holds more than its share of the capacity, rounded up.
    """

    def score(member: Member) -> float:
        return removal_score(
            member.age,
            member.uncertainty,
            capacity=capacity,
            classes=classes,
            lambda_t=lambda_t,
            lambda_u=lambda_u,
        )

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


class Robust:
    """A hook before BatchNorm: its running statistics move towards the batch's, and normalise it.

    Args:
        alpha: α, the share of the batch's statistics.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def __call__(self, norm: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        """What BatchNorm is given in place of its input."""
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean_C, variance_C = statistics(given[0])
        mean_C = (1 - self.alpha) * norm.running_mean + self.alpha * mean_C
        variance_C = (1 - self.alpha) * norm.running_var + self.alpha * variance_C
        # New tensors, not in place: a layer that is used twice needs its earlier statistics for the gradient.
        norm.running_mean, norm.running_var = mean_C.detach(), variance_C.detach()
        # Changes no value any more, but the gradient passes through the batch's statistics.
        return (renormalise(norm, given[0], mean_C, variance_C),)


@contextmanager
def robust_statistics(model: nn.Module, alpha: float) -> Iterator[None]:
    """While it lasts each batch moves the running statistics of a model in eval mode; elsewhere they only normalise."""
    handles = [norm.register_forward_pre_hook(Robust(alpha)) for norm in batch_norms(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def step(
    images: Tensor,
    ages_M: Tensor,
    *,
    student: Classifier,
    teacher: Classifier,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    alpha: float,
    nu: float,
    flip: bool,
) -> Tensor:
    """Teach the student the memory, and let the teacher follow. Changes both, and their statistics.

    The loss is the mean of E(a) · H(teacher(x), student(view(x))), with E(a) = e⁻ᵃ / (1 + e⁻ᵃ).

    Args:
        images: The memory's (M, …).
        ages_M: Their ages as fractions of the memory's capacity.
        student: Learns.
        teacher: Follows: θ ← (1 − ν) θ + ν θ_student.
        parameters: Which parameters learn, and follow.
        optimizer: The student's.
        generator: Source of the view's randomness.
        alpha: α of the robust statistics.
        nu: ν.
        flip: Whether the view may be flipped.

    Returns:
        The teacher's logits (M, C) from before the step.

    Raises:
        AdaptationError: If the loss is not finite.
    """
    with torch.no_grad(), robust_statistics(teacher, alpha):
        taught_MC: Tensor = teacher(images)
    with torch.enable_grad(), robust_statistics(student, alpha):
        log_p_MC = student(view(images, generator=generator, flip=flip)).log_softmax(dim=1)
        divergence_M = -(taught_MC.softmax(dim=1) * log_p_MC).sum(dim=1)
        descend((torch.sigmoid(-ages_M) * divergence_M).mean(), optimizer, name="rotta")
    learnt = select_parameters(student, parameters)
    with torch.no_grad():
        for name, parameter in select_parameters(teacher, parameters).items():
            parameter.lerp_(learnt[name], nu)
    return taught_MC


def collect_params(model: Classifier, parameters: Parameters) -> list[nn.Parameter]:
    """The parameters that learn. Raises: AdaptationError, if there are none."""
    return list(select_parameters(model, parameters).values())


def configure_model(model: Classifier, parameters: Parameters) -> Classifier:
    """Eval mode, so that BatchNorm uses its moving statistics, and gradients for the chosen parameters. In place."""
    model.eval()
    return learn_only(model, parameters)


def check_model(model: Classifier, parameters: Parameters) -> None:
    """Check that the model has what RoTTA adapts.

    Raises:
        AdaptationError: If the chosen parameters do not exist, or BatchNorm has no statistics or never saw data.
    """
    if parameters == "affine" and not any(isinstance(module, AFFINE_NORMS) for module in model.modules()):
        raise AdaptationError(
            "rotta adapts scale and shift of normalisation layers, and this model has none; "
            "choose other parameters, or use the source adapter"
        )
    collect_params(model, parameters)
    if any(norm.running_mean is None or norm.running_var is None for norm in batch_norms(model)):
        raise AdaptationError(
            "rotta moves BatchNorm's running statistics, and this model has a BatchNorm layer without any; "
            "train it with track_running_stats, or use another adapter"
        )
    check_trained_statistics(model)


class RoTTA(Learner):
    """Learns from a balanced memory of the stream; made for domains that change and labels that are correlated.

    Nothing changes before `update_frequency` images have come; with `episodic` a smaller batch changes nothing at all.
    Neither memory nor time grow along a stream.

    Args:
        model: The source model; copied.
        rate: Adam's rate; the paper's.
        parameters: Which parameters learn: `all`, `affine`, `body` or `head`.
        memory_size: N, the most images that the memory holds.
        update_frequency: Images between two updates.
        alpha: α, the share of the memory's statistics in BatchNorm's at each step.
        nu: ν, the share of the student in the teacher at each step.
        lambda_t: Weight of the age in what leaves the memory.
        lambda_u: Weight of the uncertainty in what leaves the memory.
        flip: Whether the student's view may be flipped left to right; not for digits and letters.
        seed: Of the student's views.
        steps: Gradient steps an update.
        episodic: Forget everything before each batch.
        predict: Whether a batch's prediction is the teacher's `before` or `after` the updates that the batch brings.

    Attributes:
        model: The student.
        teacher: The model that predicts.
        memory: The memory's members, oldest first.

    Raises:
        AdaptationError: If an option is out of range, or the model has nothing that RoTTA could adapt.
    """

    name = "rotta"
    _in_place = (*Learner._in_place, "teacher")
    teacher: Classifier
    memory: list[Member]

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float = 1e-3,
        parameters: Parameters = "affine",
        memory_size: int = 64,
        update_frequency: int = 64,
        alpha: float = 0.05,
        nu: float = 1e-3,
        lambda_t: float = 1.0,
        lambda_u: float = 1.0,
        flip: bool = True,
        seed: int = 0,
        steps: int = 1,
        episodic: bool = False,
        predict: Predict = "before",
    ) -> None:
        if memory_size < 1 or update_frequency < 1:
            raise AdaptationError(
                "expected memory_size and update_frequency of at least 1 image; "
                f"got {memory_size} and {update_frequency}"
            )
        if not (0 <= alpha <= 1 and 0 <= nu <= 1):
            raise AdaptationError(f"expected alpha and nu from 0 to 1, got alpha {alpha}, nu {nu}")
        if not (lambda_t >= 0 and lambda_u >= 0):
            raise AdaptationError(
                f"expected lambda_t and lambda_u of at least 0, got lambda_t {lambda_t}, lambda_u {lambda_u}"
            )
        self.memory_size, self.update_frequency = memory_size, update_frequency
        self.alpha, self.nu, self.lambda_t, self.lambda_u = alpha, nu, lambda_t, lambda_u
        self.flip, self.seed = flip, seed
        super().__init__(model, rate=rate, parameters=parameters, steps=steps, episodic=episodic, predict=predict)

    def _check_model(self, model: Classifier) -> None:
        check_model(model, self.parameters)

    def _configure(self, model: Classifier) -> Classifier:
        return configure_model(model, self.parameters)

    def _start(self) -> None:
        super()._start()
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self._following = select_parameters(self.teacher, self.parameters)
        self.memory = []
        self._seen = 0
        self._generator = torch.Generator().manual_seed(self.seed)

    def _adapt(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            logits_BC: Tensor = self.teacher(images)
        labels, uncertainties = logits_BC.argmax(dim=1).tolist(), entropy(logits_BC).tolist()
        for image, label, uncertainty in zip(images, labels, uncertainties, strict=True):
            self.memory = remember(
                self.memory,
                Member(image.detach().clone(), label, uncertainty, age=0),
                capacity=self.memory_size,
                classes=logits_BC.shape[1],
                lambda_t=self.lambda_t,
                lambda_u=self.lambda_u,
            )
            self._seen += 1
            if self._seen % self.update_frequency == 0:
                remembered = torch.stack([member.image for member in self.memory])
                for _ in range(self.steps):
                    self._step(remembered)
        if self.predict == "before":
            return logits_BC
        with torch.no_grad():
            after: Tensor = self.teacher(images)
        return after

    def _step(self, images: Tensor) -> Tensor:
        ages_M = torch.tensor([member.age for member in self.memory], dtype=images.dtype, device=images.device)
        return step(
            images,
            ages_M / self.memory_size,
            student=self.model,
            teacher=self.teacher,
            parameters=self.parameters,
            optimizer=self._optimizer,
            generator=self._generator,
            alpha=self.alpha,
            nu=self.nu,
            flip=self.flip,
        )

    def _state(self) -> dict[str, Any]:
        return super()._state() | {
            "teacher": {
                "parameters": {name: parameter.detach() for name, parameter in self._following.items()},
                "buffers": dict(self.teacher.named_buffers()),
            },
            "memory": [member._asdict() for member in self.memory],
            "seen": self._seen,
            "generator": self._generator.get_state(),
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        super()._check_state(state)
        own = self._state()["teacher"]
        for kind in ("parameters", "buffers"):
            check_shapes(own[kind], state["teacher"][kind])
        if len(state["memory"]) > self.memory_size:
            raise AdaptationError(
                f"expected a state with at most {self.memory_size} images in the memory, got {len(state['memory'])}; "
                "load it into an adapter of the memory_size it was saved from"
            )

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        with torch.no_grad():
            for name, parameter in self._following.items():
                parameter.copy_(state["teacher"]["parameters"][name])
            for name, buffer in self.teacher.named_buffers():
                buffer.copy_(state["teacher"]["buffers"][name])
        members = [Member(**member) for member in state["memory"]]
        self.memory = [member._replace(image=member.image.to(self.device)) for member in members]
        self._seen = state["seen"]
        self._generator.set_state(state["generator"].cpu())
