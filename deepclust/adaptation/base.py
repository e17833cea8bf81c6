"""The contract of test-time adaptation, and what its methods share.

An adapter meets a stream of unlabelled, shifted batches: `adapter(images)` returns logits and may learn from the
images, `reset()` forgets everything since it was made. It works on a copy: the model it was given never changes.

A method is a file with its options (`Config`), its maths as functions of tensors, and a subclass of `Adapter`, or of
`Learner` if it takes gradient steps, that joins them.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deepclust.adaptation.classifier import Classifier, as_classifier, check_images
from deepclust.adaptation.normalisation import check_batch_statistics, check_trained_statistics, use_batch_statistics
from deepclust.adaptation.parameters import AFFINE_NORMS, Parameters, select_parameters
from deepclust.config import Config, Count, Flag, Positive, config
from deepclust.errors import AdaptationError, ConfigError

Predict = Literal["before", "after"]

INFERENCE = "{} keeps what it learns, which torch.inference_mode() forbids; use torch.no_grad() instead"
# In forward passes of the source model, between what was measured on `small` at 28 pixels and, up to twice as much, on
# EfficientNet-Lite0 at 160.
BATCH_STATISTICS = 1.25
BACKWARD_AFFINE = 2.0
BACKWARD = 3.0
ANOTHER_MODEL = "load it into an adapter of the model it was saved from"
ANOTHER_VERSION = "load what this version's state_dict() returned"


@config
class AdapterConfig(Config):
    """The options that all adapters have."""

    inherits: ClassVar[tuple[str, ...]] = ("episodic", "predict")

    episodic: Flag = False
    """Forget everything before each batch, so that no batch depends on another."""
    predict: Predict = "before"
    """Whether a batch's prediction is made `before` or `after` the adapter has learnt from it."""

    @property
    def passes(self) -> float:
        """About how many forward passes of the source model an image costs the method with these options."""
        return 1.0


@config
class LearnerConfig(AdapterConfig):
    """The options of all adapters that take gradient steps."""

    inherits: ClassVar[tuple[str, ...]] = ("rate", "parameters", "steps", *AdapterConfig.inherits)

    rate: Positive = 1e-3
    """Adam's rate."""
    parameters: Parameters = "affine"
    """Which parameters learn: `all`, `affine` (of the normalisations), `body` (all but the head's) or `head`."""
    steps: Count = 1
    """Gradient steps a batch; the prediction is from before the first or after the last."""

    @property
    def passes(self) -> float:
        """As of every adapter: the steps, and the prediction where it comes after them."""
        after = BATCH_STATISTICS if self.predict == "after" else 0.0
        return self.steps * self.step_passes + after

    @property
    def step_passes(self) -> float:
        """The same of one gradient step."""
        return BATCH_STATISTICS + (BACKWARD_AFFINE if self.parameters == "affine" else BACKWARD)


class Adapter:
    """A classifier that may learn from what it is asked.

    Args:
        model: The source model: a `Classifier`, or any model that returns logits; copied.
        config: The method's options; None takes the defaults.

    Attributes:
        name: The method's name, as in `ADAPTERS`.
        config_class: The class of its options.
        frozen: Whether the model stays as it was given, in eval mode, so that its features of a batch can be shared.
        model: The copy that adapts.

    Raises:
        AdaptationError: If the method does not fit the model.
        ConfigError: If the options are another method's.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[AdapterConfig]] = AdapterConfig
    frozen: ClassVar[bool] = False
    config: AdapterConfig
    model: Classifier
    # Parts of the state that a batch changes in place; the others are replaced, so that holding them is enough.
    _in_place: ClassVar[tuple[str, ...]] = ()
    # Those of them that only a gradient step changes.
    _by_steps: ClassVar[tuple[str, ...]] = ()
    _remedy: ClassVar[str] = "leave the batch out, or mend the model"

    def __init__(self, model: nn.Module, config: AdapterConfig | None = None) -> None:
        self.config = self.config_class() if config is None else config
        if not isinstance(self.config, self.config_class):
            kind = f"{self.config_class.__module__}.{self.config_class.__qualname__}"
            raise ConfigError(f"expected the options of {self.name} as a {kind}, got {config!r}")
        source = as_classifier(model)
        self._check_model(source)
        self.model = self._configure(copy.deepcopy(source))
        self._start()
        self.check_mode()
        self._initial = self.state_dict()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of a batch of images (batch, …), without gradient.

        Raises:
            AdaptationError: If the batch cannot be used; the adapter is then as before.
        """
        return self._tried(images, whole=self._can_fail_late(images))[0]

    def attempt(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """As the call, and what `undo` needs to take the batch back: a copy of all that the batch may change."""
        return self._tried(images, whole=True)

    def _tried(self, images: Tensor, *, whole: bool) -> tuple[Tensor, dict[str, Any]]:
        self.check_mode(images)
        check_images(images)
        self._check_batch(images)
        before = self._snapshot(whole=whole)
        try:
            if self.config.episodic:
                self.reset()
            logits = self._adapt(images)
            check_logits(logits, name=self.name, remedy=self._remedy)
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
                f"{ANOTHER_VERSION}"
            )
        self.check_mode()
        state, before = copy.deepcopy(state), self._snapshot(whole=True)
        try:
            self._check_state(state)
            self._load(state)
        except AdaptationError:
            raise
        except Exception as error:
            self._load(before)
            raise AdaptationError(
                f"expected a state of the adapter {self.name}, got one that cannot be loaded ({error}); "
                f"{ANOTHER_VERSION}"
            ) from error

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        values = itertools.chain(self.model.parameters(), self.model.buffers())
        return next((value.device for value in values), torch.device("cpu"))

    def _can_fail_late(self, images: Tensor) -> bool:
        """Whether a batch can fail after its first gradient step, so that parameters have to be copied before it."""
        return False

    def _snapshot(self, *, whole: bool) -> dict[str, Any]:
        """What `_load` needs to undo what comes; without the parts that gradient steps change, unless `whole`."""
        return {
            name: copy.deepcopy(part) if name in self._in_place else part
            for name, part in self._state().items()
            if whole or name not in self._by_steps
        }

    def _check_model(self, model: Classifier) -> None:
        """Raises AdaptationError if the method does not fit the model. Nothing is changed."""

    def _check_batch(self, images: Tensor) -> None:
        """Raises AdaptationError if the method cannot use the batch. Nothing is changed."""

    def _configure(self, model: Classifier) -> Classifier:
        """Bring a fresh copy of the source model into the method's state: eval mode without gradients, if not said."""
        return model.eval().requires_grad_(False)

    def _start(self) -> None:
        """Make what the method keeps beside the model, from the configured `self.model`."""

    @torch.no_grad()
    def _adapt(self, images: Tensor) -> Tensor:
        """Logits of a checked batch, and whatever the method learns from it; nothing, if not said."""
        logits: Tensor = self.model(images)
        return logits

    def _state(self) -> dict[str, Any]:
        """All that a stream changes; not copied. What it changes in place has to be named in `_in_place`."""
        return {}

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raises AdaptationError if `_load` could not take the state. Nothing is changed."""

    def _load(self, state: dict[str, Any]) -> None:
        """Take over a state that was checked and belongs to nobody else; or what `_snapshot` has of one."""


class Learner(Adapter, ABC):
    """An adapter that takes gradient steps, where nothing else is said with batch statistics in BatchNorm."""

    config_class = LearnerConfig
    config: LearnerConfig
    _in_place: ClassVar[tuple[str, ...]] = ("parameters", "buffers", "optimizer")
    _by_steps: ClassVar[tuple[str, ...]] = ("parameters", "optimizer")
    _remedy = "lower the rate, or reset the adapter sooner"

    def check_mode(self, images: Tensor | None = None) -> None:
        """Raises AdaptationError in torch.inference_mode(), or if the images were made there: they have no gradient."""
        super().check_mode(images)
        if images is not None and images.is_inference():
            raise AdaptationError(
                "expected images that a gradient can pass, got some made in torch.inference_mode(); "
                "make them under torch.no_grad(), or give images.clone()"
            )

    def _check_model(self, model: Classifier) -> None:
        which = self.config.parameters
        if which == "affine" and not any(isinstance(module, AFFINE_NORMS) for module in model.modules()):
            raise AdaptationError(
                f"{self.name} adapts scale and shift of normalisation layers, and this model has none; "
                "choose other parameters, or use the source adapter"
            )
        select_parameters(model, which)
        check_trained_statistics(model)

    def _check_batch(self, images: Tensor) -> None:
        check_batch_statistics(images, self.model)

    def _configure(self, model: Classifier) -> Classifier:
        use_batch_statistics(model)
        return self._learn_only(model)

    def _learn_only(self, model: Classifier) -> Classifier:
        """Gradients for the chosen parameters alone; where the head tells them, its output is checked. In place."""
        model.requires_grad_(False)
        for parameter in select_parameters(model, self.config.parameters).values():
            parameter.requires_grad_(True)
        if self.config.parameters in ("body", "head"):
            model.rely_on_head()
        return model

    def _start(self) -> None:
        self._learning = select_parameters(self.model, self.config.parameters)
        self._optimizer = torch.optim.Adam(self._learning.values(), lr=self.config.rate)

    def _can_fail_late(self, images: Tensor) -> bool:
        # A single step comes last, after all checks (`descend`); what follows it is arithmetic on finite numbers. Only
        # an interrupt or a lack of memory inside the optimiser could leave the step half done. `episodic` changes the
        # parameters first of all.
        return self.config.episodic or self.config.predict == "after" or self.config.steps > 1

    def _adapt(self, images: Tensor) -> Tensor:
        logits = self._step(images)
        for _ in range(self.config.steps - 1):
            self._step(images)
        return logits if self.config.predict == "before" else super()._adapt(images)

    def _step(self, images: Tensor) -> Tensor:
        """Take one gradient step on a batch; logits from before it, without gradient."""
        with torch.enable_grad():
            logits, loss = self._loss(images)
            if loss is not None:
                descend(loss, logits, self._optimizer, name=self.name)
        return logits.detach()

    @abstractmethod
    def _loss(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of a batch, and the loss whose gradient is descended; None takes no step."""

    def _state(self) -> dict[str, Any]:
        return {
            "model": {name: list(parameter.shape) for name, parameter in self.model.named_parameters()},
            "parameters": {name: parameter.detach() for name, parameter in self._learning.items()},
            "buffers": dict(self.model.named_buffers()),
            "optimizer": self._optimizer.state_dict(),
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        own = self._state()
        # The model's also of what does not learn: the head's, from which the number of classes is known.
        for kind in ("parameters", "buffers", "model"):
            check_shapes(own[kind], state[kind])
        check_optimizer(self._optimizer, state["optimizer"])

    def _load(self, state: dict[str, Any]) -> None:
        copy_into(self._learning, state.get("parameters", {}))
        copy_into(dict(self.model.named_buffers()), state["buffers"])
        if "optimizer" in state:
            self._optimizer.load_state_dict(state["optimizer"])
        self._optimizer.zero_grad()


def check_logits(logits: Tensor, *, name: str, remedy: str) -> None:
    """Raises AdaptationError if logits are not finite."""
    if not torch.isfinite(logits).all():
        raise AdaptationError(f"{name}: the model's logits are not finite; {remedy}")


def descend(loss: Tensor, logits: Tensor, optimizer: torch.optim.Optimizer, *, name: str) -> None:
    """Take one step on a loss of logits. Changes the parameters through the optimiser, when all else is checked.

    Raises:
        AdaptationError: If the loss, its gradient or the logits are not finite, or there is no gradient; no parameter
            is then changed.
    """
    if not torch.isfinite(loss):
        raise AdaptationError(
            f"{name}'s loss is {loss.item()}, not a finite number; lower its rate, or reset it sooner"
        )
    if not loss.requires_grad:
        raise AdaptationError(f"{name}: no gradient reaches the chosen parameters; choose others, or mend the model")
    check_logits(logits, name=name, remedy=Learner._remedy)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    # A finite loss can have an infinite gradient, as a square root has at 0: one step, and every weight is NaN.
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not all(torch.isfinite(parameter.grad).all() for parameter in learning if parameter.grad is not None):
        raise AdaptationError(f"{name}'s gradient is not finite on this batch; leave the batch out, or mend the model")
    optimizer.step()


@torch.no_grad()
def copy_into(own: dict[str, Any], given: dict[str, Tensor]) -> None:
    """Copy the values given into the adapter's own tensors of their names."""
    for name, value in given.items():
        own[name].copy_(value)


def check_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raises AdaptationError if an optimiser's state is of other groups, or of parameters of other shapes."""
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
            f"shapes; {ANOTHER_MODEL}"
        )


def check_shapes(expected: dict[str, Any], got: dict[str, Any]) -> None:
    """Raises AdaptationError if a state's tensors, or their shapes as lists, have other names or shapes."""
    if expected.keys() != got.keys():
        differ = ", ".join(sorted(expected.keys() ^ got.keys())[:3])
        raise AdaptationError(f"expected a state of this model and these parameters, got one that differs in {differ}")
    for name, value in expected.items():
        own, other = (list(getattr(each, "shape", each)) for each in (value, got[name]))
        if own != other:
            raise AdaptationError(f"expected {name} of shape {own} in the state, got {other}; {ANOTHER_MODEL}")
