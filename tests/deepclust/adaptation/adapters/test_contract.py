"""The contract that every adapter keeps."""

import copy
import io
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch import nn

from deepclust.adaptation import ADAPTERS
from deepclust.adaptation.adapters.t3a import Supports
from deepclust.adaptation.base import Learner
from deepclust.adaptation.classifier import Classifier
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import (
    CLASSES,
    FEATURES,
    LIVELY,
    MODULES,
    ROLES,
    Faulty,
    classifier,
    same,
    same_state,
    state,
    stream,
)

LEARNERS = [name for name, adapter in ADAPTERS.items() if issubclass(adapter, Learner)]
# What a stream changes: in the others, nothing.
STATEFUL = [*LEARNERS, "t3a"]
WHICH = [{"parameters": "all"}, {"parameters": "affine"}]
STEPS = {"steps": 3, "predict": "after"}
# RoTTA learns from its memory every so many images; here at every batch.
QUICK = {"rotta": {"update_frequency": 9}}
CASES = [*((name, {}) for name in ADAPTERS), *((name, STEPS) for name in LEARNERS), ("t3a", {"predict": "before"})]


def make(name, model, **options):
    return ADAPTERS[name](model, **(QUICK.get(name, {}) | options))


def faulty(seed=LIVELY):
    model = classifier(seed)
    model.featurizer = Faulty(model.featurizer)
    return model


def nan(features):
    return features * torch.nan


def infinity(features):
    return features / 0


def stop(features):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_model_given_never_changes(name):
    model = classifier(LIVELY)
    before, modes = state(model), [module.training for module in model.modules()]
    wants = [parameter.requires_grad for parameter in model.parameters()]
    adapter = make(name, model)
    for images in stream():
        adapter(images)
    adapter.reset()
    assert same(state(model), before)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ADAPTERS)
def test_images_are_not_modified_and_logits_carry_no_gradient(name):
    adapter = make(name, classifier(LIVELY))
    for images in stream(3):
        before = images.clone()
        logits = adapter(images)
        assert torch.equal(images, before)
        assert not logits.requires_grad
        assert logits.shape == (len(images), CLASSES)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_stream_is_learnt_from_and_reset_forgets_it_bit_for_bit(name, options):
    adapter = make(name, classifier(LIVELY), **options)
    fresh, weights = adapter.state_dict(), state(adapter.model)
    first = [adapter(images) for images in stream()]
    assert same_state(adapter.state_dict(), fresh) == (name not in STATEFUL)
    adapter.reset()
    assert same_state(adapter.state_dict(), fresh)
    assert same(state(adapter.model), weights)
    second = [adapter(images) for images in stream()]
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_state_saved_in_mid_stream_goes_on_bit_for_bit_in_a_fresh_adapter(name, options):
    *past, first, second, third = stream()
    adapter = make(name, classifier(LIVELY), **options)
    for images in past:
        adapter(images)
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    expected = [adapter(images) for images in (first, second, third)]
    fresh = make(name, classifier(LIVELY), **options)
    fresh.load_state_dict(saved)
    assert all(
        torch.equal(fresh(images), logits) for images, logits in zip((first, second, third), expected, strict=True)
    )
    assert same_state(fresh.state_dict(), adapter.state_dict())


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_saved_state_is_not_changed_by_later_batches_of_who_saved_or_loaded_it(name, options):
    first, second, third = stream(3)
    adapter, other = (make(name, classifier(LIVELY), **options) for _ in range(2))
    adapter(first)
    saved = adapter.state_dict()
    copied = copy.deepcopy(saved)
    other.load_state_dict(saved)
    for images in (second, third):
        adapter(images), other(images)
    assert same_state(saved, copied)


@pytest.mark.parametrize("name", STATEFUL)
def test_reset_after_a_loaded_state_is_the_adapters_own_beginning(name):
    first, second = stream(2)
    adapter, fresh = (make(name, classifier(LIVELY)) for _ in range(2))
    adapter(first)
    other = make(name, classifier(LIVELY))
    other.load_state_dict(adapter.state_dict())
    other.reset()
    assert torch.equal(other(second), fresh(second))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_state_of_another_method_or_without_its_parts_is_an_error_and_changes_nothing(name):
    adapter = make(name, classifier(LIVELY))
    adapter(stream(1)[0])
    before = adapter.state_dict()
    for other in ADAPTERS.keys() - {name}:
        with pytest.raises(AdaptationError, match=f"a state of the adapter {name}, got one of '{other}'"):
            adapter.load_state_dict(make(other, classifier(LIVELY)).state_dict())
    with pytest.raises(AdaptationError, match=f"a state of the adapter {name}, got one of None"):
        adapter.load_state_dict({})
    with pytest.raises(AdaptationError, match=r"expected a state with adapter.*got adapter, extra"):
        adapter.load_state_dict({"adapter": name, "extra": 1})
    assert same_state(adapter.state_dict(), before)


@pytest.mark.parametrize(("name", "options"), [*product(LEARNERS, WHICH), ("t3a", {})], ids=str)
def test_a_state_of_a_model_with_another_number_of_classes_is_an_error_and_changes_nothing(name, options):
    model = classifier(LIVELY)
    adapter = make(name, model, **options)
    adapter(stream(1)[0])
    before = adapter.state_dict()
    for classes in (CLASSES + 1, CLASSES - 1):
        other = Classifier(model.featurizer, nn.Linear(FEATURES, classes).double())
        other = make(name, other, **options)
        other(stream(1)[0])
        with pytest.raises(AdaptationError, match="load it into an adapter of the model it was saved from"):
            adapter.load_state_dict(other.state_dict())
        with pytest.raises(AdaptationError, match="load it into an adapter of the model it was saved from"):
            make(name, model, **options).load_state_dict(other.state_dict())
    assert same_state(adapter.state_dict(), before)


def drop(state, *path):
    """A copy of a state without what lies at the path."""
    state = copy.deepcopy(state)
    inside = state
    for step in path[:-1]:
        inside = inside[step]
    del inside[path[-1]]
    return state


SPOILS = {
    "a group missing": (LEARNERS, lambda state: drop(state, "optimizer", "param_groups", 0)),
    "a group's parameter missing": (LEARNERS, lambda state: drop(state, "optimizer", "param_groups", 0, "params", 0)),
    "no groups": (LEARNERS, lambda state: drop(state, "optimizer", "param_groups")),
    "an optimiser of other sizes": (LEARNERS, lambda state: resized(state)),
    "a generator too short": (["roid", "rotta"], lambda state: state | {"generator": state["generator"][:9]}),
    "no teacher's parameters": (["rotta"], lambda state: drop(state, "teacher", "parameters")),
    "an age missing": (["rotta"], lambda state: drop(state, "memory", 0, "age")),
    "columns of different lengths": (["t3a", "tsd"], lambda state: shortened(state)),
    "no labels": (["t3a", "tsd"], lambda state: drop(state, "bank", "labels")),
}


def resized(state):
    state = copy.deepcopy(state)
    for values in state["optimizer"]["state"].values():
        values["exp_avg"] = torch.zeros(99, dtype=torch.float64)
    return state


def shortened(state):
    return state | {"bank": state["bank"] | {"entropies": state["bank"]["entropies"][1:]}}


@pytest.mark.parametrize(
    ("name", "spoil"),
    [(name, spoil) for names, spoil in SPOILS.values() for name in names],
    ids=[f"{name}-{title}" for title, (names, _) in SPOILS.items() for name in names],
)
def test_a_state_with_something_wrong_inside_is_an_error_and_changes_nothing(name, spoil):
    adapter, other = (make(name, classifier(LIVELY)) for _ in range(2))
    first, second, third = stream(3)
    adapter(first), other(first), other(second)
    before = adapter.state_dict()
    with pytest.raises(AdaptationError, match=r"load it into an adapter of|load what this version"):
        adapter.load_state_dict(spoil(other.state_dict()))
    assert same_state(adapter.state_dict(), before)
    adapter.load_state_dict(other.state_dict())
    assert torch.equal(adapter(third), other(third))


@pytest.mark.parametrize(("name", "part"), [("t3a", "bank"), ("roid", "mean_prediction"), ("rotta", "memory")])
def test_what_is_loaded_goes_to_the_device_of_the_model(name, part):
    adapter, other = (make(name, classifier(LIVELY)) for _ in range(2))
    images = stream(1)[0]
    adapter(images), other(images)
    adapter.model.to("meta")
    if name == "t3a":
        adapter.bank = Supports(*(column.to("meta") for column in adapter.bank))
    adapter.load_state_dict(other.state_dict())
    assert {value.device.type for value in tensors(adapter._state()[part])} == {"meta"}


def tensors(value):
    """All tensors of a part of a state."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in values for tensor in tensors(each)]


@pytest.mark.parametrize("name", LEARNERS)
def test_a_state_of_other_parameters_is_an_error_and_changes_nothing(name):
    adapter = make(name, classifier(LIVELY), parameters="affine")
    before = adapter.state_dict()
    with pytest.raises(AdaptationError, match=r"of this model and these parameters, got one that differs in"):
        adapter.load_state_dict(make(name, classifier(LIVELY), parameters="body").state_dict())
    assert same_state(adapter.state_dict(), before)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_episodic_is_a_fresh_adapter_for_each_batch(name, options):
    episodic = make(name, classifier(LIVELY), episodic=True, **options)
    lasting = make(name, classifier(LIVELY), **options)
    differs = False
    for images in stream(4):
        logits = episodic(images)
        assert torch.equal(logits, make(name, classifier(LIVELY), **options)(images))
        differs |= not torch.equal(logits, lasting(images))
    assert differs == (name in STATEFUL)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", LEARNERS)
def test_before_and_after_are_the_models_predictions_around_the_steps(name, steps):
    options = {"prior_correction": "none"} if name == "roid" else {}
    before = make(name, classifier(LIVELY), steps=steps, rate=1e-2, **options)
    after = make(name, classifier(LIVELY), steps=steps, rate=1e-2, predict="after", **options)
    predictor = "teacher" if name == "rotta" else "model"
    for images in stream(3):
        with torch.no_grad():
            expected = getattr(before, predictor)(images)
        assert torch.equal(before(images), expected)
        logits = after(images)
        with torch.no_grad():
            assert torch.equal(logits, getattr(after, predictor)(images))
        assert not torch.allclose(logits, expected)
        assert same(state(before.model), state(after.model)), "what is learnt is the same"


@pytest.mark.parametrize("name", LEARNERS)
def test_each_step_on_a_batch_goes_further(name):
    images = stream(1)[0]
    counts = {}
    for steps in (1, 2, 3):
        adapter = make(name, classifier(LIVELY), steps=steps)
        adapter(images)
        counts[steps] = {int(values["step"]) for values in adapter.state_dict()["optimizer"]["state"].values()}
    assert counts == {1: {1}, 2: {2}, 3: {3}}


@pytest.mark.parametrize("parameters", ROLES)
@pytest.mark.parametrize("name", LEARNERS)
def test_exactly_the_chosen_parameters_move(name, parameters):
    model = classifier(LIVELY)
    adapter = make(name, model, parameters=parameters)
    for images in stream(4):
        adapter(images)
    before, after = model.state_dict(), adapter.model.state_dict()
    moved = {role for role, module in MODULES.items() if not torch.equal(before[module], after[module])}
    # What the first bias adds, batch statistics take away again: only rounding moves it.
    assert moved - {"b1"} == set(ROLES[parameters]) - {"b1"}
    assert moved <= set(ROLES[parameters])
    asking = {name for name, parameter in adapter.model.named_parameters() if parameter.requires_grad}
    assert asking == {MODULES[role] for role in ROLES[parameters]}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_model_trained_on_after_the_adapter_was_made_is_not_followed(name):
    model = classifier(LIVELY)
    images = stream(1)[0]
    truth = make(name, model)(images)
    adapter = make(name, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    adapter.reset()
    assert torch.equal(adapter(images), truth)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_work_where_gradients_are_switched_off(name):
    images = stream(2)
    truth = make(name, classifier(LIVELY))
    with torch.no_grad():
        adapter = make(name, classifier(LIVELY))
        results = [adapter(batch) for batch in images]
    assert all(torch.equal(result, truth(batch)) for result, batch in zip(results, images, strict=True))


@pytest.mark.parametrize("name", ADAPTERS)
def test_inference_mode_is_refused_before_anything_where_something_is_kept(name):
    images = stream(2)
    adapter, untouched = make(name, classifier(LIVELY)), make(name, classifier(LIVELY))
    saved = untouched.state_dict()
    for use in (lambda: adapter(images[0]), adapter.reset, lambda: adapter.load_state_dict(saved)):
        refused = pytest.raises(AdaptationError, match=f"{name} keeps what it learns.*use torch.no_grad")
        with torch.inference_mode(), refused if name in STATEFUL else nullcontext():
            use()
    with torch.inference_mode(), refused if name in STATEFUL else nullcontext():
        make(name, classifier(LIVELY))
    assert same_state(adapter.state_dict(), untouched.state_dict())
    assert all(torch.equal(adapter(batch), untouched(batch)) for batch in images)


@pytest.mark.parametrize("name", ADAPTERS)
def test_images_made_in_inference_mode_are_refused_where_gradients_are_needed(name):
    adapter, untouched = make(name, classifier(LIVELY)), make(name, classifier(LIVELY))
    first, second = stream(2)
    with torch.inference_mode():
        made_there = first.clone()
    refused = pytest.raises(AdaptationError, match=r"made in torch.inference_mode\(\).*images.clone\(\)")
    with refused if name in LEARNERS else nullcontext():
        adapter(made_there)
    assert torch.equal(adapter(made_there.clone()), untouched(first)) or name == "t3a"
    assert name == "t3a" or torch.equal(adapter(second), untouched(second))


def storages(value):
    """Where the tensors of a part of a state lie in memory."""
    return {tensor.data_ptr() for tensor in tensors(value)}


@pytest.mark.parametrize("name", ["t3a", "tsd", "rotta"])
def test_a_batch_copies_nothing_of_bank_or_memory_that_is_replaced_and_a_state_dict_copies_all(name):
    adapter = make(name, classifier(LIVELY))
    first, second = stream(2)
    adapter(first)
    kept = "memory" if name == "rotta" else "bank"
    held = storages(adapter._state()[kept])
    assert held
    assert not held & storages(adapter.state_dict()[kept])
    logits, before = adapter.attempt(second)
    assert storages(before[kept]) == held
    adapter.undo(before)
    assert storages(adapter._state()[kept]) == held
    assert torch.equal(adapter(second), logits)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_batch_that_is_undone_leaves_everything_as_it_was(name, options):
    adapter, untouched = (make(name, classifier(LIVELY), **options) for _ in range(2))
    first, second, third = stream(3)
    adapter(first), untouched(first)
    _, before = adapter.attempt(second)
    adapter.undo(before)
    assert same_state(adapter.state_dict(), untouched.state_dict())
    assert torch.equal(adapter(third), untouched(third))


@pytest.mark.parametrize("name", ADAPTERS)
def test_parameters_that_the_model_has_frozen_are_adapted_all_the_same(name):
    adapter = make(name, classifier(LIVELY).requires_grad_(False))
    truth = make(name, classifier(LIVELY))
    assert all(torch.equal(adapter(images), truth(images)) for images in stream(3))


@pytest.mark.parametrize("name", ADAPTERS)
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
def test_a_bad_batch_is_an_error_and_leaves_the_adapter_as_it_was(name, spoil, message):
    adapter, untouched = make(name, classifier(LIVELY)), make(name, classifier(LIVELY))
    first, second, third = stream(3)
    adapter(first), untouched(first)
    with pytest.raises(AdaptationError, match=message):
        adapter(spoil(second))
    assert same_state(adapter.state_dict(), untouched.state_dict())
    assert torch.equal(adapter(third), untouched(third))


@pytest.mark.parametrize("name", ["bn", "tent", "pseudo_label", "shot_im", "tsd", "roid"])
def test_a_batch_of_one_is_an_error_where_batch_statistics_are_used(name):
    adapter, untouched = make(name, classifier(LIVELY)), make(name, classifier(LIVELY))
    first, second = stream(2)
    with pytest.raises(AdaptationError, match=r"at least two images a batch.*collect a larger batch"):
        adapter(first[:1])
    assert torch.equal(adapter(second), untouched(second))


@pytest.mark.parametrize("name", ["source", "t3a", "lame", "rotta"])
def test_a_batch_of_one_will_do_where_running_statistics_are_used(name):
    assert make(name, classifier(LIVELY))(stream(1)[0][:1]).shape == (1, CLASSES)


@pytest.mark.parametrize("episodic", [False, True])
@pytest.mark.parametrize("fault", [nan, infinity, stop])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_an_error_at_any_call_of_the_model_leaves_everything_as_it_was(name, options, fault, episodic):
    adapter, untouched = (make(name, faulty(), episodic=episodic, **options) for _ in range(2))
    first, second, third = stream(3)
    adapter(first), untouched(first)
    steps = options.get("steps", 1)
    # ROID asks its model for two views a step, and RoTTA another model for predictions.
    calls = {"roid": 2 * steps}.get(name, steps) + (options == STEPS and name != "rotta")
    for call in range(1, calls + 1):
        adapter.model.featurizer.fault, adapter.model.featurizer.countdown = fault, call
        # The last call with STEPS is the answer's, after all steps. RoTTA's student learns from a memory.
        learning = name in LEARNERS and not (options == STEPS and name != "rotta" and call == calls)
        message = "out of memory" if fault is stop else f"{name}'s loss is" if learning else "logits are not finite"
        with pytest.raises(RuntimeError if fault is stop else AdaptationError, match=message):
            adapter(second)
        # What ROID's first view brings is in a loss only with the second.
        last = (0, -1) if name == "roid" else (0,)
        assert adapter.model.featurizer.countdown in last, "the fault has to have come at the last call"
        assert same_state(adapter.state_dict(), untouched.state_dict())
        assert same(state(adapter.model), state(untouched.model))
    assert torch.equal(adapter(third), untouched(third))
    assert same_state(adapter.state_dict(), untouched.state_dict())


@pytest.mark.parametrize("name", ADAPTERS)
def test_rates_are_named_as_the_remedy_only_where_something_learns(name):
    adapter = make(name, faulty(), predict="after")
    predictor = adapter.teacher if name == "rotta" else adapter.model
    earlier = {"roid": 2, "rotta": 2}.get(name, int(name in LEARNERS))
    predictor.featurizer.fault, predictor.featurizer.countdown = nan, earlier + 1
    with pytest.raises(AdaptationError, match="logits are not finite") as caught:
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


@pytest.mark.parametrize("name", LEARNERS)
def test_a_gradient_that_is_not_finite_stops_before_the_step(name):
    adapter, untouched = make(name, faulty()), make(name, faulty())
    first, second, third = stream(3)
    adapter(first), untouched(first)
    adapter.model.featurizer.fault, adapter.model.featurizer.countdown = RootAtZero.apply, 1
    with pytest.raises(AdaptationError, match=f"{name}'s gradient is not finite"):
        adapter(second)
    assert same_state(adapter.state_dict(), untouched.state_dict())
    assert torch.equal(adapter(third), untouched(third))


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "rate above 0, got 0"),
        ({"rate": float("nan")}, "rate above 0, got nan"),
        ({"rate": float("inf")}, "finite rate above 0, got inf"),
        ({"steps": 0}, "at least one step a batch, got 0"),
        ({"parameters": "norm"}, "parameters to be one of all, affine, body, head; got 'norm'"),
    ],
    ids=str,
)
def test_options_of_learners_out_of_range_are_errors(name, options, message):
    with pytest.raises(AdaptationError, match=message):
        make(name, classifier(LIVELY), **options)


@pytest.mark.parametrize("name", ADAPTERS)
def test_predictions_are_made_before_or_after_and_never_otherwise(name):
    with pytest.raises(AdaptationError, match="predict to be one of before, after; got 'during'"):
        make(name, classifier(LIVELY), predict="during")
