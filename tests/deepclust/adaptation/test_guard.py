"""The guard: whose answer it gives, what the adapter learns, and that it keeps the adapters' contract."""

import math
import statistics

import pytest
import torch
from torch import nn

from deepclust.adaptation import BN, Adapter, Classifier, Source, Tent
from deepclust.adaptation.guard import SURE, UNKNOWN_GAIN, Baselines, Guard
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import classifier, same, same_state, state, stream

CLASSES = 4


def logits(classes, confidence):
    """Logits whose softmax has the confidence at the classes."""
    rest = (1 - confidence) / (CLASSES - 1)
    chances = torch.full((len(classes), CLASSES), rest, dtype=torch.float64)
    chances[torch.arange(len(classes)), torch.as_tensor(classes)] = confidence
    return chances.log()


class Scripted(Adapter):
    """An adapter that answers what it is told, and counts what it has learnt."""

    name = "scripted"

    def __init__(self, model):
        self.learnt = torch.zeros(())
        self.says = None
        super().__init__(model)

    def _configure(self, model):
        return model

    def _adapt(self, images):
        self.learnt = self.learnt + 1
        if self.says is None:
            raise AdaptationError("nothing to say")
        return self.says

    def _state(self):
        return {"learnt": self.learnt}

    def _load(self, state):
        self.learnt = state["learnt"]


def scripted(reference=None, **options):
    baselines = Baselines(classifier())
    baselines.confidence = reference
    adapter = Scripted(classifier())
    return Guard(adapter, baselines, **options), adapter


def ask(guard, adapter, source, bn, own):
    adapter.says = own
    return guard.answer(torch.zeros(len(source), 1, 3, 4), source, bn)


ONE = [0, 1, 2, 3] * 25
OTHER = [1, 1, 2, 3] * 25  # a quarter differs


def test_bn_is_trusted_where_it_wins_back_half_of_the_lost_confidence_and_not_where_it_wins_less():
    for won, trusted in ((0.11, True), (0.09, False)):
        guard, adapter = scripted(reference=0.9)
        source, bn = logits(ONE, 0.7), logits(ONE, 0.7 + won)
        # Differs from bn, as from source, on every image: neither allows it.
        given = ask(guard, adapter, source, bn, logits([3, 2, 1, 0] * 25, 0.99))
        assert torch.equal(given, bn if trusted else source)
        assert guard.verdict.answer == ("bn" if trusted else "source")


def test_without_a_reference_bn_has_to_win_a_fixed_amount():
    for won, trusted in ((UNKNOWN_GAIN + 0.01, True), (UNKNOWN_GAIN - 0.01, False)):
        guard, adapter = scripted()
        source, bn = logits(ONE, 0.5), logits(ONE, 0.5 + won)
        assert torch.equal(ask(guard, adapter, source, bn, logits([3, 2, 1, 0] * 25, 0.9)), bn if trusted else source)


def test_a_gain_that_may_be_chance_is_not_trusted():
    guard, adapter = scripted(reference=0.6)
    source = logits([0] * 4, 0.5)
    bn = torch.cat([logits([0] * 2, 0.97), logits([0] * 2, 0.27)])  # mean .62, and a standard error of .2
    assert torch.equal(ask(guard, adapter, source, bn, logits([1] * 4, 0.9)), source)


def test_an_adapter_may_differ_from_source_by_the_tolerance_alone():
    for differing, given_own in ((1, True), (2, False)):
        guard, adapter = scripted(reference=0.9, tolerance=0.01)
        source = logits(ONE, 0.9)
        own = logits([1] * differing + ONE[differing:], 0.95) if differing == 1 else logits([1, 2, *ONE[2:]], 0.95)
        assert torch.equal(ask(guard, adapter, source, None, own), own if given_own else source)


def test_where_bn_is_trusted_an_adapter_may_differ_from_it_by_what_bn_has_won():
    for won, given_own in ((0.26, True), (0.22, False)):
        guard, adapter = scripted(reference=0.9)
        source, bn, own = logits(ONE, 0.6), logits(ONE, 0.6 + won), logits(OTHER, 0.9)
        given = ask(guard, adapter, source, bn, own)
        assert torch.equal(given, own if given_own else bn)
        assert "25.0%" in guard.verdict.reason


def test_nothing_is_learnt_from_a_batch_whose_answer_is_not_given():
    guard, adapter = scripted(reference=0.9)
    source = logits(ONE, 0.9)
    ask(guard, adapter, source, None, source)
    assert adapter.learnt == 1
    ask(guard, adapter, source, None, logits(OTHER, 0.9))
    assert (adapter.learnt, guard.verdict.answer) == (1, "source")
    assert guard.answers == {"adapter": 1, "source": 1}


def test_the_window_forgets_what_is_old():
    guard, adapter = scripted(reference=0.9, window=100)
    source = logits(ONE, 0.9)
    ask(guard, adapter, source, None, logits(OTHER, 0.9))
    assert guard.verdict.answer == "source"
    ask(guard, adapter, source, None, source)  # a full window of agreement
    assert guard.verdict.answer == "adapter"


def test_one_class_taking_over_is_named():
    guard, adapter = scripted(reference=0.9)
    ask(guard, adapter, logits(ONE, 0.9), None, logits([0] * 100, 0.99))
    assert guard.verdict.reason.startswith("few classes take over, and it differs from source on 75.0%")


def test_a_guarded_adapter_is_never_worse_than_source_by_more_than_the_tolerance_without_bn():
    model = classifier()
    labels = torch.randint(CLASSES, (9,), generator=torch.Generator().manual_seed(0))
    guard = Guard(Tent(model, rate=0.5), Baselines(model), tolerance=0.0, window=9)
    guard.baselines.bn = lambda images: None
    for images in stream():
        wrong = (guard(images).argmax(dim=1) != labels).sum()
        assert wrong <= (Source(model)(images).argmax(dim=1) != labels).sum()
    assert guard.answers["source"], "the rate is chosen so that Tent goes wrong"


def test_a_batch_that_the_adapter_can_not_use_is_answered_by_source_and_says_why():
    model = classifier()
    guard = Guard(Tent(model), model)
    image = stream(1)[0][:1]
    assert torch.equal(guard(image), Source(model)(image))
    assert "expected at least two images a batch" in guard.verdict.reason
    assert torch.equal(Guard(BN(model), model)(image), Source(model)(image))


def test_a_batch_that_the_adapter_can_not_use_is_answered_by_bn_where_it_is_trusted():
    for won, trusted in ((0.11, "bn"), (0.09, "source")):
        guard, adapter = scripted(reference=0.9)
        source, bn = logits(ONE, 0.7), logits(ONE, 0.7 + won)
        assert torch.equal(ask(guard, adapter, source, bn, None), {"bn": bn, "source": source}[trusted])
        assert (guard.verdict.answer, guard.verdict.reason) == (trusted, "nothing to say")


def test_inference_mode_is_refused_before_anything_and_the_guard_goes_on():
    model = classifier()
    first, second = stream(2)
    for adapter in (Tent, BN):
        guard, untouched = Guard(adapter(model), model), Guard(adapter(model), model)
        with torch.inference_mode():
            made_there = second.clone()
            with pytest.raises(AdaptationError, match=r"guarded .* keeps what it learns.*use torch.no_grad"):
                guard(first)
        if adapter is Tent:
            with pytest.raises(AdaptationError, match=r"made in torch.inference_mode\(\)"):
                guard(made_there)
        assert not guard.answers
        for images in (first, second):
            assert torch.equal(guard(images), untouched(images))


def test_a_guarded_call_copies_the_state_once(monkeypatch):
    model = classifier()
    guard = Guard(Tent(model), model)
    guard(stream(1)[0])
    copies = []
    for method in ("_snapshot", "state_dict"):
        whole = getattr(guard.adapter, method)
        monkeypatch.setattr(guard.adapter, method, lambda whole=whole: copies.append(1) or whole())
    guard(stream(1)[0])
    assert len(copies) == 1


def test_where_nothing_is_learnt_bn_is_given_exactly_where_it_is_trusted():
    model = classifier()
    answers = set()
    for images in stream():
        guard = Guard(BN(model), model)
        source, bn = Source(model)(images), BN(model)(images)
        # The rule by hand: enough confidence is won on average, by more than chance; or the classes are the same.
        gains = [b.softmax(0).max().item() - s.softmax(0).max().item() for s, b in zip(source, bn, strict=True)]
        mean, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
        trusted = mean >= UNKNOWN_GAIN and mean > SURE * error
        given = bn if trusted or torch.equal(source.argmax(dim=1), bn.argmax(dim=1)) else source
        assert torch.equal(guard(images), given)
        answers.add(guard.verdict.answer)
    assert answers == {"adapter", "source"}


def test_guards_that_share_their_baselines_answer_as_those_that_do_not():
    model = classifier()
    shared = Baselines(model, [torch.cat(stream(2))])
    first, second = Guard(Tent(model), shared), Guard(BN(model), shared)
    alone = Guard(Tent(model), Baselines(model, [torch.cat(stream(2))]))
    for images in stream():
        given = first(images)
        second(images)
        assert torch.equal(given, alone(images))


def test_the_reference_is_the_mean_confidence_on_source_images():
    model = classifier()
    images = torch.cat(stream(2))
    truth = model(images).detach().softmax(dim=1).amax(dim=1).mean()
    assert Baselines(model, images.split(5)).confidence == pytest.approx(float(truth), rel=1e-12)
    assert Baselines(model).confidence is None
    with pytest.raises(AdaptationError, match="expected images of the source"):
        Baselines(model, [])


def test_reset_and_state_go_on_bit_for_bit():
    model = classifier()
    guard = Guard(Tent(model, rate=0.01), model, window=20)
    first = [guard(images) for images in stream()]
    answers = guard.answers.copy()
    guard.reset()
    half = [guard(images) for images in stream()[:3]]
    saved = guard.state_dict()
    fresh = Guard(Tent(model, rate=0.01), model, window=20)
    fresh.load_state_dict(saved)
    rest = [fresh(images) for images in stream()[3:]]
    assert all(torch.equal(left, right) for left, right in zip(first, half + rest, strict=True))
    assert fresh.answers == answers
    with pytest.raises(AdaptationError, match="a state of the adapter bn, got one of 'tent'"):
        Guard(BN(model), model).load_state_dict(saved)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {name: value for name, value in state.items() if name != "evidence"},
        lambda state: {name: value for name, value in state.items() if name != "adapter"},
        lambda state: state | {"verdict": {"answer": "both", "reason": ""}},
        lambda state: state | {"verdict": {"answer": "bn"}},
        lambda state: state | {"answers": {"nobody": 3}},
        lambda state: state | {"evidence": [{"source": torch.zeros(9)}]},
        lambda state: state | {"adapter": state["adapter"] | {"parameters": {}}},
    ],
    ids=[
        "no evidence",
        "no adapter",
        "unknown verdict",
        "half a verdict",
        "unknown answers",
        "half evidence",
        "adapter",
    ],
)
def test_a_state_that_is_not_a_guards_is_an_error_and_changes_nothing(spoil):
    model = classifier()
    guard, untouched, other = (Guard(Tent(model), model) for _ in range(3))
    first, second = stream(2)
    guard(first), untouched(first), other(second)
    with pytest.raises(AdaptationError, match=r"expected (a|the answers)"):
        guard.load_state_dict(spoil(other.state_dict()))
    assert same_state(guard.state_dict(), untouched.state_dict())
    assert torch.equal(guard(second), untouched(second))


def test_the_evidence_goes_to_the_device_of_the_model():
    model = classifier()
    guard = Guard(Tent(model), model)
    guard(stream(1)[0])
    saved = guard.state_dict()
    guard.adapter.model.to("meta")
    guard.load_state_dict(saved)
    assert {evidence["source"].device.type for evidence in guard.state_dict()["evidence"]} == {"meta"}


def test_the_model_given_never_changes_and_bad_options_are_refused():
    model = classifier()
    before = state(model)
    guard = Guard(Tent(model, rate=0.1), model)
    for images in stream():
        guard(images)
    assert same(state(model), before)
    for options in ({"window": 0}, {"tolerance": 1.0}, {"tolerance": -0.1}):
        with pytest.raises(AdaptationError, match="expected a window of at least 1 image and a tolerance"):
            Guard(Tent(model), model, **options)
    with pytest.raises(AdaptationError, match="got NaN"):
        guard(stream(1)[0] * torch.nan)


def test_a_model_without_batch_norm_is_compared_with_source():
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5)), nn.Linear(5, CLASSES)).double()
    guard = Guard(Tent(model, rate=1e-6), model)
    assert guard.baselines.bn(stream(1)[0]) is None
    guard(stream(1)[0])
    assert guard.verdict.answer == "adapter"
