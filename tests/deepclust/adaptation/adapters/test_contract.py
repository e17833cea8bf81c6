"""The contract that every adapter keeps."""

import copy
import io
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn

from deepclust.adaptation import ADAPTERS, Classifier
from deepclust.adaptation.adapters import lame
from deepclust.adaptation.adapters.t3a import Supports
from deepclust.adaptation.base import Learner
from deepclust.errors import AdaptationError, ConfigError
from tests.deepclust.adaptation import nets
from tests.deepclust.adaptation.nets import CLASSES, FEATURES, LIVELY, MODULES, Faulty, classifier, same, state, stream

LEARNERS = [name for name, adapter in ADAPTERS.items() if issubclass(adapter, Learner)]
# What a stream changes: in the others, nothing.
STATEFUL = [*LEARNERS, "t3a"]
STEPS = {"steps": 3, "predict": "after"}
CASES = [*((name, {}) for name in ADAPTERS), ("tent", STEPS), ("rotta", STEPS), ("t3a", {"predict": "before"})]


def make(name, model=None, **options):
    # RoTTA learns from its memory every so many images; here at every batch.
    quick = {"update_frequency": 9} if name == "rotta" else {}
    return nets.make(name, classifier(LIVELY) if model is None else model, **(quick | options))


def faulty():
    model = classifier(LIVELY)
    model.featurizer = Faulty(model.featurizer)
    return model


def refuses(message):
    return pytest.raises(AdaptationError, match=message)


def unharmed(adapter, untouched, images):
    """Assert that an adapter is as one that was spared what this one has gone through, and goes on as it."""
    assert same(adapter.state_dict(), untouched.state_dict())
    assert same(state(adapter.model), state(untouched.model))
    assert torch.equal(adapter(images), untouched(images))


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_model_and_the_images_given_never_change_and_logits_carry_no_gradient(name):
    model = classifier(LIVELY)
    modules, parameters = list(model.modules()), list(model.parameters())
    before, modes = state(model), [module.training for module in modules]
    adapter, batches = make(name, model), stream(3)
    given = copy.deepcopy(batches)
    for images in batches:
        logits = adapter(images)
        assert not logits.requires_grad
        assert logits.shape == (len(images), CLASSES)
    adapter.reset()
    assert same(batches, given)
    assert same(state(model), before)
    assert [module.training for module in modules] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_stream_is_learnt_from_reset_forgets_it_and_a_saved_state_goes_on_with_it_bit_for_bit(name, options):
    adapter, batches = make(name, **options), stream(5)
    fresh = adapter.state_dict()
    first = [adapter(images) for images in batches]
    assert same(adapter.state_dict(), fresh) == (name not in STATEFUL)
    adapter.reset()
    assert same(adapter.state_dict(), fresh)
    assert same([adapter(images) for images in batches[:2]], first[:2])
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    copied, other = copy.deepcopy(saved), make(name, **options)
    other.load_state_dict(saved)
    assert same([adapter(images) for images in batches[2:]], first[2:])
    assert same([other(images) for images in batches[2:]], first[2:])
    assert same(other.state_dict(), adapter.state_dict())
    assert same(saved, copied), "later batches do not change a saved state"
    other.reset()
    assert torch.equal(other(batches[0]), first[0]), "reset is the adapter's own beginning"


def spoil(*path, by=None):
    """What makes of a state a copy with something else in place of what lies at the path, or nothing there."""

    def spoilt(state):
        inside = state = copy.deepcopy(state)
        for step in path[:-1]:
            inside = inside[step]
        if by is None:
            del inside[path[-1]]
        else:
            inside[path[-1]] = by(inside[path[-1]])
        return state

    return spoilt


def fewer_classes(name):
    """The state of an adapter of a model with a class less."""
    other = make(name, Classifier(classifier(LIVELY).featurizer, nn.Linear(FEATURES, CLASSES - 1).double()))
    other(stream(1)[0])
    return other.state_dict()


STATES = {
    "another method's": ("t3a", lambda state: make("bn").state_dict()),
    "no part": ("tsd", spoil("batches")),
    "another part": ("lame", lambda state: state | {"extra": 1}),
    "fewer classes, affine": ("tent", lambda state: fewer_classes("tent")),
    "fewer classes, prototypes": ("t3a", lambda state: fewer_classes("t3a")),
    "other parameters": ("rotta", lambda state: make("rotta", parameters="body").state_dict()),
    "a group's parameter missing": ("roid", spoil("optimizer", "param_groups", 0, "params", 0)),
    "an optimiser of other sizes": ("tent", spoil("optimizer", "state", 0, "exp_avg", by=lambda old: torch.zeros(99))),
    "half a generator": ("roid", spoil("generator", by=lambda old: old[:9])),
    "a mean of other classes": ("roid", spoil("mean_prediction", by=lambda old: torch.ones(5))),
    "a teacher of other sizes": ("rotta", spoil("teacher", MODULES["scale"], by=lambda old: torch.ones(7))),
    "an age missing": ("rotta", spoil("memory", 0, "age")),
    "too many members": ("rotta", spoil("memory", by=lambda old: old * 9)),
    "a label missing": ("t3a", spoil("bank", "labels", by=lambda old: old[1:])),
    "labels beyond": ("tsd", spoil("bank", "labels", by=lambda old: old + 4)),
}


@pytest.mark.parametrize(("name", "wrong"), STATES.values(), ids=list(STATES))
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(name, wrong):
    adapter, untouched, other = make(name), make(name), make(name)
    first, second, third = stream(3)
    adapter(first), untouched(first), other(first), other(second)
    with refuses(r"load it into an adapter|load what this version|load the state as|one that differs in|got one of"):
        adapter.load_state_dict(wrong(other.state_dict()))
    unharmed(adapter, untouched, third)


def tensors(value):
    """All tensors of a part of a state."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in values for tensor in tensors(each)]


@pytest.mark.parametrize(("name", "part"), [("t3a", "bank"), ("roid", "mean_prediction"), ("rotta", "memory")])
def test_what_is_loaded_goes_to_the_device_of_the_model(name, part):
    adapter, other = make(name), make(name)
    images = stream(1)[0]
    adapter(images), other(images)
    adapter.model.to("meta")
    if name == "t3a":
        adapter.bank = Supports(*(column.to("meta") for column in adapter.bank))
    adapter.load_state_dict(other.state_dict())
    assert {value.device.type for value in tensors(adapter._state()[part])} == {"meta"}


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_episodic_is_a_fresh_adapter_for_each_batch(name, options):
    episodic, lasting, fresh = (make(name, episodic=episodic, **options) for episodic in (True, False, False))
    differs = False
    for images in stream(3):
        logits = episodic(images)
        fresh.reset()
        assert torch.equal(logits, fresh(images))
        differs |= not torch.equal(logits, lasting(images))
    assert differs == (name in STATEFUL)


@pytest.mark.parametrize("name", ADAPTERS)
def test_neither_a_frozen_model_nor_its_later_training_nor_switched_off_gradients_change_anything(name):
    model, (first, second) = classifier(LIVELY), stream(2)
    truth = make(name, model)
    with torch.no_grad():
        adapter = make(name, model.requires_grad_(False))
        for parameter in model.parameters():
            parameter.add_(1)
        adapter.reset()
        assert torch.equal(adapter(first), truth(first))
    assert torch.equal(adapter(second), truth(second))


@pytest.mark.parametrize("name", ["tent", "rotta", "t3a", "bn"])
def test_inference_mode_and_what_was_made_there_are_refused_where_they_would_spoil_something(name):
    first, second = stream(2)
    adapter, untouched = make(name), make(name)
    saved = untouched.state_dict()
    for use in (lambda: adapter(first), adapter.reset, lambda: adapter.load_state_dict(saved), lambda: make(name)):
        refused = refuses(f"{name} keeps what it learns.*use torch.no_grad") if name in STATEFUL else nullcontext()
        with torch.inference_mode(), refused:
            made_there = first.clone()
            use()
    if name in LEARNERS:
        with refuses(r"made in torch.inference_mode\(\).*images.clone\(\)"):
            adapter(made_there)
    unharmed(adapter, untouched, made_there.clone())
    assert torch.equal(adapter(second), untouched(second))


@pytest.mark.parametrize(("name", "kept"), [("t3a", "bank"), ("tsd", "bank"), ("rotta", "memory")])
def test_a_batch_copies_nothing_of_bank_or_memory_that_is_replaced_and_a_state_dict_copies_all(name, kept):
    def places(state):
        return {tensor.data_ptr() for tensor in tensors(state[kept])}

    adapter, (first, second) = make(name), stream(2)
    adapter(first)
    held = places(adapter._state())
    assert held
    assert not held & places(adapter.state_dict())
    logits, before = adapter.attempt(second)
    assert places(before) == held
    adapter.undo(before)
    assert places(adapter._state()) == held
    assert torch.equal(adapter(second), logits)


# With update_frequency 4, nine images are two updates.
LATE = [("rotta", {"update_frequency": 4}), *(("tent", late) for late in ({"steps": 2}, {"predict": "after"}))]


@pytest.mark.parametrize(
    ("name", "options", "copied"),
    [*((name, {}, False) for name in ("tent", "tsd", "roid", "rotta")), *((*case, True) for case in LATE)]
    + [("tent", {"episodic": True}, True)],
    ids=str,
)
def test_a_batch_copies_what_its_step_changes_only_where_it_can_fail_after_it(name, options, copied):
    adapter, heavy = make(name, **options), {"parameters", "optimizer", "teacher"}
    with mock.patch.object(adapter, "_snapshot", wraps=adapter._snapshot) as copies:
        adapter(stream(1)[0])
    assert copies.call_args_list == [mock.call(whole=copied)]
    assert bool(adapter._snapshot(whole=copied).keys() & heavy) == copied
    assert adapter.attempt(stream(1)[0])[1].keys() & heavy, "what may be undone later is always copied"


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_batch_that_is_undone_leaves_everything_as_it_was(name, options):
    adapter, untouched = make(name, **options), make(name, **options)
    first, second, third = stream(3)
    adapter(first), untouched(first)
    adapter.undo(adapter.attempt(second)[1])
    unharmed(adapter, untouched, third)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: images.masked_fill(images > 1, torch.nan), "got NaN or infinity"),
        (lambda images: images / 0, "got NaN or infinity"),
        (lambda images: images.long(), "expected images as floats, got torch.int64"),
        (lambda images: images[:0], r"got shape \(0, 1, 3, 4\)"),
        (lambda images: images[0, 0, 0], r"expected a batch of images \(batch, …\), got shape \(4,\)"),
    ],
)
def test_a_bad_batch_is_an_error_and_leaves_the_adapter_as_it_was(spoil, message):
    adapter, untouched = make("tent"), make("tent")
    first, second, third = stream(3)
    adapter(first), untouched(first)
    with refuses(message):
        adapter(spoil(second))
    unharmed(adapter, untouched, third)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_batch_of_one_is_an_error_exactly_where_batch_statistics_are_used(name):
    adapter, untouched, (first, second) = make(name), make(name), stream(2)
    if name in ("source", "t3a", "lame", "rotta"):
        assert adapter(first[:1]).shape == (1, CLASSES)
        return
    with refuses(r"at least two images a batch.*collect a larger batch"):
        adapter(first[:1])
    unharmed(adapter, untouched, second)


def nan(features):
    return features * torch.nan


def stop(features):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in ADAPTERS), ("tent", STEPS), ("rotta", STEPS)])
@pytest.mark.parametrize(("fault", "episodic"), [(nan, False), (nan, True), (stop, False)])
def test_an_error_at_any_call_of_the_model_leaves_everything_as_it_was(name, options, fault, episodic):
    adapter, untouched = (make(name, faulty(), episodic=episodic, **options) for _ in range(2))
    first, second, third = stream(3)
    adapter(first), untouched(first)
    after = options == STEPS and name == "tent"  # its last call is the answer's, after all steps
    # ROID asks its model for two views a step, and RoTTA's student learns from a memory.
    calls = {"roid": 2}.get(name, options.get("steps", 1) + after)
    for call in range(1, calls + 1):
        adapter.model.featurizer.fault, adapter.model.featurizer.countdown = fault, call
        learning = name in LEARNERS and not (after and call == calls)
        message = "out of memory" if fault is stop else f"{name}'s loss is" if learning else "logits are not finite"
        with pytest.raises(RuntimeError if fault is stop else AdaptationError, match=message):
            adapter(second)
        # What ROID's first view brings is in a loss only with the second.
        last = (0, -1) if name == "roid" else (0,)
        assert adapter.model.featurizer.countdown in last, "the fault has to have come at the last call"
        assert same(adapter.state_dict(), untouched.state_dict())
    unharmed(adapter, untouched, third)


@pytest.mark.parametrize("name", ["bn", "tent", "roid", "rotta"])
def test_rates_are_named_as_the_remedy_only_where_something_learns(name):
    adapter = make(name, faulty(), predict="after")
    predictor = adapter.teacher if name == "rotta" else adapter.model
    earlier = {"roid": 2, "rotta": 2}.get(name, int(name in LEARNERS))
    predictor.featurizer.fault, predictor.featurizer.countdown = nan, earlier + 1
    with refuses("logits are not finite") as caught:
        adapter(stream(1)[0])
    assert ("rate" in str(caught.value)) == (name in LEARNERS)


class RootAtZero(torch.autograd.Function):
    """The identity, with the gradient that a square root has at 0."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 0


@pytest.mark.parametrize("name", ["tent", "pseudo_label", "rotta", "roid"])
def test_a_gradient_that_is_not_finite_stops_before_the_step(name):
    adapter, untouched = make(name, faulty()), make(name, faulty())
    first, second, third = stream(3)
    adapter(first), untouched(first)
    adapter.model.featurizer.fault, adapter.model.featurizer.countdown = RootAtZero.apply, 1
    with refuses(f"{name}'s gradient is not finite"):
        adapter(second)
    unharmed(adapter, untouched, third)


def test_logits_that_are_not_finite_stop_before_the_step_even_where_the_loss_is():
    model = classifier(LIVELY)
    with torch.no_grad():
        model.head.bias[-1] = -torch.inf
    adapter = make("pseudo_label", model, threshold=0.0)
    before = adapter.state_dict()
    with refuses("pseudo_label: the model's logits are not finite; lower the rate"):
        adapter(stream(1)[0])
    assert same(adapter.state_dict(), before)


def test_options_out_of_range_or_of_another_adapter_are_errors():
    for options, message in (({"rate": float("inf")}, "got inf"), ({"threshold": 1.0}, "threshold is 1")):
        with pytest.raises(ConfigError, match=message):
            make("pseudo_label", **options)
    with pytest.raises(ConfigError, match=r"the options of tent as a .*tent.Config, got Config\(.*affinity"):
        ADAPTERS["tent"](classifier(), lame.Config())
