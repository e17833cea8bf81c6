"""The contract of test-time adaptation, and what its methods share.

An adapter meets a stream of unlabelled, shifted batches: `adapter(images)` returns logits and may learn from the
images, `reset()` forgets everything since it was made. It works on a copy: the model it was given never changes.

A method's file has Tent's shape (arXiv 2006.10726): `collect_params` (what learns), `configure_model` (the state the
model must be in), `check_model` (whether it can be adapted, with the remedy), and one step as a free function.
"""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from deepclust.adaptation.classifier import Classifier, as_classifier, check_images
from deepclust.adaptation.parameters import Parameters, select_parameters
from deepclust.errors import AdaptationError

Predict = Literal["before", "after"]

INFERENCE = "{} keeps what it learns, which torch.inference_mode() forbids; use torch.no_grad() instead"


class Adapter(ABC):
    """A classifier that may learn from what it is asked.

    Args:
        model: The source model: a `Classifier`, or any model that returns logits; copied.
        episodic: Forget everything before each batch, so that no batch depends on another.
        predict: Whether a batch's prediction is made `before` or `after` the adapter has learnt from it.

    Attributes:
        name: The method's name, as in `ADAPTERS`.
        model: The copy that adapts.

    Raises:
        AdaptationError: If an option is unknown, or the method does not fit the model.
    """

    name: ClassVar[str]
    model: Classifier
    # Parts of the state that a batch changes in place; the others are replaced, so that holding them is enough.
    _in_place: ClassVar[tuple[str, ...]] = ()
    _remedy: ClassVar[str] = "leave the batch out, or mend the model"

    def __init__(self, model: nn.Module, *, episodic: bool = False, predict: Predict = "before") -> None:
        if predict not in get_args(Predict):
            raise AdaptationError(f"expected predict to be one of {', '.join(get_args(Predict))}; got {predict!r}")
        self.episodic, self.predict = episodic, predict
        source = as_classifier(model)
        self._check_model(source)
        self.model = self._configure(copy.deepcopy(source))
        self._start()
        self.check_mode()
        self._initial = self.state_dict()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of a batch of images (batch, …), without gradient.

        Raises:
            AdaptationError: If the batch can not be used; the adapter is then as before.
        """
        return self.attempt(images)[0]

    def attempt(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """As the call, and what `undo` needs to take the batch back."""
        self.check_mode(images)
        check_images(images)
        self._check_batch(images)
        before = self._snapshot()
        try:
            if self.episodic:
                self.reset()
            logits = self._adapt(images)
            if not torch.isfinite(logits).all():
                raise AdaptationError(f"{self.name}: the model's logits are not finite; {self._remedy}")
        except BaseException:
            self.undo(before)
            raise
        return logits.detach(), before

    def undo(self, before: dict[str, Any]) -> None:
        """Take back what was learnt since `attempt` returned `before`, which can be used once."""
        self._load(before)

    def check_mode(self, images: Tensor | None = None) -> None:
        """Raises AdaptationError in torch.inference_mode(), if the adapter keeps anything."""
        # What is made there can never again learn, nor be changed in place: the adapter would be broken for good.
        if torch.is_inference_mode_enabled() and self._state():
            raise AdaptationError(INFERENCE.format(self.name))

    def reset(self) -> None:
        """Forget all that was learnt: the adapter is as it was when made."""
        self.check_mode()
        self._load(copy.deepcopy(self._initial))

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the stream has changed, of tensors, numbers, lists and dicts."""
        state: dict[str, Any] = copy.deepcopy(self._state())
        return {"adapter": self.name} | state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring back what `state_dict` returned; for a model and options like those it was made with.

        Raises:
            AdaptationError: If the state is of another method or another model; the adapter is then as before.
        """
        if state.get("adapter") != self.name:
            raise AdaptationError(f"expected a state of the adapter {self.name}, got one of {state.get('adapter')!r}")
        expected = {"adapter", *self._state()}
        if state.keys() != expected:
            raise AdaptationError(
                f"expected a state with {', '.join(sorted(expected))}, got {', '.join(sorted(state))}; "
                "load what this version's state_dict() returned"
            )
        self.check_mode()
        state, before = copy.deepcopy(state), self._snapshot()
        try:
            self._check_state(state)
            self._load(state)
        except AdaptationError:
            raise
        except Exception as error:
            self._load(before)
            raise AdaptationError(
                f"expected a state of the adapter {self.name}, got one that can not be loaded ({error}); "
                "load what this version's state_dict() returned"
            ) from error

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        values = itertools.chain(self.model.parameters(), self.model.buffers())
        return next((value.device for value in values), torch.device("cpu"))

    def _snapshot(self) -> dict[str, Any]:
        """What `_load` needs to undo what comes."""
        state = self._state()
        return state | {name: copy.deepcopy(state[name]) for name in self._in_place}

    def _check_model(self, model: Classifier) -> None:
        """Raises AdaptationError if the method does not fit the model. Nothing is changed."""

    def _check_batch(self, images: Tensor) -> None:
        """Raises AdaptationError if the method can not use the batch. Nothing is changed."""

    @abstractmethod
    def _configure(self, model: Classifier) -> Classifier:
        """Bring a fresh copy of the source model into the method's state."""

    def _start(self) -> None:
        """Make what the method keeps beside the model, from the configured `self.model`."""

    @abstractmethod
    def _adapt(self, images: Tensor) -> Tensor:
        """Logits of a checked batch, and whatever the method learns from it."""

    def _state(self) -> dict[str, Any]:
        """All that a stream changes; not copied. What it changes in place has to be named in `_in_place`."""
        return {}

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raises AdaptationError if `_load` could not take the state. Nothing is changed."""

    def _load(self, state: dict[str, Any]) -> None:
        """Take over a state that was checked and belongs to nobody else."""


class Learner(Adapter):
    """An adapter that takes gradient steps.

    Args:
        model: The source model; copied.
        rate: The optimiser's rate.
        parameters: Which parameters learn: `all`, `affine`, `body` or `head`.
        steps: Gradient steps a batch.
        episodic: Forget everything before each batch.
        predict: Whether a batch's prediction is the model's `before` its first or `after` its last step.

    Raises:
        AdaptationError: If an option is out of range, or the method does not fit the model.
    """

    _in_place: ClassVar[tuple[str, ...]] = ("parameters", "buffers", "optimizer")
    _remedy = "lower the rate, or reset the adapter sooner"

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float,
        parameters: Parameters,
        steps: int = 1,
        episodic: bool = False,
        predict: Predict = "before",
    ) -> None:
        if not 0 < rate < math.inf:
            raise AdaptationError(f"expected a finite rate above 0, got {rate}")
        if steps < 1:
            raise AdaptationError(f"expected at least one step a batch, got {steps}")
        self.rate, self.parameters, self.steps = rate, parameters, steps
        super().__init__(model, episodic=episodic, predict=predict)

    def check_mode(self, images: Tensor | None = None) -> None:
        """Raises AdaptationError in torch.inference_mode(), or if the images were made there: they have no gradient."""
        super().check_mode(images)
        if images is not None and images.is_inference():
            raise AdaptationError(
                "expected images that a gradient can pass, got some made in torch.inference_mode(); "
                "make them under torch.no_grad(), or give images.clone()"
            )

    def _start(self) -> None:
        self._learning = select_parameters(self.model, self.parameters)
        self._optimizer = self._make_optimizer(list(self._learning.values()))

    def _make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.rate)

    def _adapt(self, images: Tensor) -> Tensor:
        self._begin(images)
        logits = self._step(images)
        for _ in range(self.steps - 1):
            self._step(images)
        if self.predict == "before":
            return logits
        with torch.no_grad():
            after: Tensor = self.model(images)
        return after

    def _begin(self, images: Tensor) -> None:
        """What is done once a batch, before its first step."""

    @abstractmethod
    def _step(self, images: Tensor) -> Tensor:
        """Take one gradient step on a batch; logits from before it, without gradient."""

    def _state(self) -> dict[str, Any]:
        return {
            "model": {name: list(parameter.shape) for name, parameter in self.model.named_parameters()},
            "parameters": {name: parameter.detach() for name, parameter in self._learning.items()},
            "buffers": dict(self.model.named_buffers()),
            "optimizer": self._optimizer.state_dict(),
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        own = self._state()
        for kind in ("parameters", "buffers"):
            check_shapes(own[kind], state[kind])
        # Also of what does not learn: the head's, from which the number of classes is known.
        shapes, got = own["model"], state["model"]
        for name in sorted(shapes.keys() | got.keys()):
            if shapes.get(name) != got.get(name):
                raise AdaptationError(
                    f"expected a state of a model with {name} of shape {shapes.get(name)}, got {got.get(name)}; "
                    "load it into an adapter of the model it was saved from"
                )
        check_optimizer(self._optimizer, state["optimizer"])

    def _load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self._learning.items():
                parameter.copy_(state["parameters"][name])
            for name, buffer in self.model.named_buffers():
                buffer.copy_(state["buffers"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._optimizer.zero_grad()


def learn_only(model: Classifier, parameters: Parameters) -> Classifier:
    """Gradients for the chosen parameters alone; where the head tells them, its output is checked. In place.

    Raises:
        AdaptationError: If the model has none of them.
    """
    model.requires_grad_(False)
    for parameter in select_parameters(model, parameters).values():
        parameter.requires_grad_(True)
    if parameters in ("body", "head"):
        model.rely_on_head()
    return model


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, *, name: str) -> None:
    """Take one step on a loss. Changes the parameters through the optimiser.

    Raises:
        AdaptationError: If the loss or its gradient is not finite, or there is none; no parameter is then changed.
    """
    if not torch.isfinite(loss):
        raise AdaptationError(
            f"{name}'s loss is {loss.item()}, not a finite number; lower its rate, or reset it sooner"
        )
    if not loss.requires_grad:
        raise AdaptationError(f"{name}: no gradient reaches the chosen parameters; choose others, or mend the model")
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    # A finite loss can have an infinite gradient, as a square root has at 0: one step, and every weight is NaN.
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not all(torch.isfinite(parameter.grad).all() for parameter in learning if parameter.grad is not None):
        raise AdaptationError(f"{name}'s gradient is not finite on this batch; leave the batch out, or mend the model")
    optimizer.step()


def check_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Check that an optimiser's state fits.

    Raises:
        AdaptationError: If it is of other groups, or of parameters of other shapes.
    """
    groups = optimizer.state_dict()["param_groups"]
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fits = [(group.keys(), group["params"]) for group in groups] == [
        (group.keys(), group["params"]) for group in state["param_groups"]
    ] and all(
        index < len(learning) and all(value.shape in (learning[index].shape, ()) for value in values.values())
        for index, values in state["state"].items()
    )
    if not fits:
        raise AdaptationError(
            f"expected the optimiser's state of {len(learning)} parameters of this model, got one of other groups or "
            "shapes; load it into an adapter of the model it was saved from"
        )


def check_shapes(expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """Check that a state's tensors fit.

    Raises:
        AdaptationError: If names or shapes differ, as where the model has another number of classes.
    """
    if expected.keys() != got.keys():
        differ = ", ".join(sorted(expected.keys() ^ got.keys())[:3])
        raise AdaptationError(f"expected a state of this model and these parameters, got one that differs in {differ}")
    for name, value in expected.items():
        if value.shape != got[name].shape:
            raise AdaptationError(
                f"expected {name} of shape {tuple(value.shape)} in the state, got {tuple(got[name].shape)}; "
                "load it into an adapter of the model it was saved from"
            )
