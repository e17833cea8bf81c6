"""The guard: whose answer it gives, what the adapter learns, and that it keeps the adapters' contract."""

from unittest import mock

import pytest
import torch

from deepclust.adaptation import BN, Source, Tent
from deepclust.adaptation.guard import UNKNOWN_GAIN, Baselines, Guard
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import classifier, make, same, state, stream

CLASSES = 4
ONE = [0, 1, 2, 3] * 25
OTHER = [1, 1, 2, 3] * 25  # a quarter differs
ALL = [3, 2, 1, 0] * 25  # all differ


def logits(classes, confidence):
    """Logits whose softmax has the confidence at the classes."""
    chances = torch.full((len(classes), CLASSES), (1 - confidence) / (CLASSES - 1), dtype=torch.float64)
    chances[range(len(classes)), classes] = confidence
    return chances.log()


class Scripted(Source):
    """Answers what it is told, and counts what it has learnt."""

    learnt = 0

    def _adapt(self, images):
        self.learnt += 1
        if self.says is None:
            raise AdaptationError("nothing to say")
        return self.says

    def _state(self):
        return {"learnt": self.learnt}

    def _load(self, state):
        self.learnt = state["learnt"]


def scripted(reference=0.9, **options):
    baselines = Baselines(classifier())
    baselines.confidence = reference
    return Guard(Scripted(classifier()), baselines, **options)


def guarded(adapter=Tent):
    return Guard(adapter(classifier()), classifier())


def ask(guard, source, bn, own):
    guard.adapter.says = own
    return guard.answer(torch.zeros(len(source), 1, 3, 4), source, bn)


def test_bn_is_trusted_where_it_wins_enough_confidence_also_for_a_batch_the_adapter_cannot_use():
    # Where the source has lost .2 of its confidence, half of it has to be won back.
    for reference, lost, enough in ((0.9, 0.7, 0.1), (None, 0.5, UNKNOWN_GAIN)):
        for trusted, won in ((True, enough + 0.01), (False, enough - 0.01)):
            source, bn = logits(ONE, lost), logits(ONE, lost + won)
            # An answer that differs from both on every image, or none.
            for own, reason in ((logits(ALL, 0.99), "100.0%"), (None, "nothing to say")):
                guard = scripted(reference)
                assert torch.equal(ask(guard, source, bn, own), bn if trusted else source)
                assert guard.verdict.answer == ("bn" if trusted else "source")
                assert reason in guard.verdict.reason
    source, bn = logits([0] * 4, 0.5), torch.cat([logits([0] * 2, 0.97), logits([0] * 2, 0.27)])
    assert torch.equal(ask(scripted(0.6), source, bn, logits([1] * 4, 0.9)), source), ".12, with an error of .2"


def test_an_adapter_may_differ_from_source_by_the_tolerance_and_from_a_trusted_bn_by_what_that_has_won():
    source = logits(ONE, 0.9)
    for own, given in ((logits([1, *ONE[1:]], 0.95), True), (logits([1, 2, *ONE[2:]], 0.95), False)):
        assert torch.equal(ask(scripted(tolerance=0.01), source, None, own), own if given else source)
    for won, given in ((0.26, True), (0.22, False)):
        guard, bn, own = scripted(), logits(ONE, 0.6 + won), logits(OTHER, 0.9)
        assert torch.equal(ask(guard, logits(ONE, 0.6), bn, own), own if given else bn)
        assert "25.0%" in guard.verdict.reason


def test_nothing_is_learnt_from_a_batch_whose_answer_is_not_given_and_the_window_forgets_what_is_old():
    guard, source = scripted(window=100), logits(ONE, 0.9)
    for own, learnt, answer in ((ONE, 1, "adapter"), (OTHER, 1, "source"), (ONE, 2, "adapter")):
        ask(guard, source, None, logits(own, 0.9))
        assert (guard.adapter.learnt, guard.verdict.answer) == (learnt, answer)
    assert guard.answers == {"adapter": 2, "source": 1}
    ask(guard, source, None, logits([0] * 100, 0.99))
    assert guard.verdict.reason.startswith("few classes take over, and it differs from source on 75.0%")


def test_a_guarded_adapter_is_never_worse_than_source_by_more_than_the_tolerance_without_bn():
    model = classifier()
    labels = torch.randint(CLASSES, (9,), generator=torch.Generator().manual_seed(0))
    guard = Guard(make("tent", model, rate=0.5), model, tolerance=0.0, window=9)
    guard.baselines.bn = lambda images: None
    for images in stream():
        wrong = (guard(images).argmax(dim=1) != labels).sum()
        assert wrong <= (Source(model)(images).argmax(dim=1) != labels).sum()
    assert guard.answers["source"], "the rate is chosen so that Tent goes wrong"


@pytest.mark.parametrize("adapter", [Tent, BN])
def test_a_batch_that_neither_adapter_nor_bn_can_use_is_answered_by_source_and_says_why(adapter):
    guard, image = guarded(adapter), stream(1)[0][:1]
    assert torch.equal(guard(image), Source(classifier())(image))
    assert "two images" in guard.verdict.reason


@pytest.mark.parametrize("adapter", [Tent, BN])
def test_inference_mode_is_refused_before_anything_and_the_guard_goes_on(adapter):
    first, second = stream(2)
    guard, untouched = guarded(adapter), guarded(adapter)
    with torch.inference_mode():
        made_there = second.clone()
        with pytest.raises(AdaptationError, match=r"guarded .* keeps what it learns.*use torch.no_grad"):
            guard(first)
    if adapter is Tent:
        with pytest.raises(AdaptationError, match=r"made in torch.inference_mode\(\)"):
            guard(made_there)
    assert not guard.answers
    assert all(torch.equal(guard(images), untouched(images)) for images in (first, second))


def test_a_guarded_call_copies_the_state_once_and_neither_nan_nor_an_empty_window_is_taken():
    guard = guarded()
    with pytest.raises(AdaptationError, match="got NaN"):
        guard(stream(1)[0] * torch.nan)
    with pytest.raises(AdaptationError, match="expected a window of at least 1 image and a tolerance"):
        Guard(guard.adapter, guard.baselines, window=0)
    with mock.patch.object(guard.adapter, "_snapshot", wraps=guard.adapter._snapshot) as copies:
        guard(stream(1)[0])
    assert copies.call_args_list == [mock.call(whole=True)]


def test_the_reference_is_the_mean_confidence_on_source_images_and_guards_may_share_it():
    model, images = classifier(), torch.cat(stream(2))
    shared, own = Baselines(model, images.split(5)), Baselines(model, [images])
    assert shared.confidence == pytest.approx(model(images).softmax(dim=1).amax(dim=1).mean().item(), rel=1e-12)
    first, second, alone = Guard(Tent(model), shared), Guard(BN(model), shared), Guard(Tent(model), own)
    for batch in stream(4):
        given, source, bn = first(batch), Source(model)(batch), BN(model)(batch)
        assert torch.equal(given, alone(batch))
        assert torch.equal(second(batch), bn if second.verdict.answer == "adapter" else source)


def test_reset_and_state_go_on_bit_for_bit_and_the_model_given_never_changes():
    model = classifier()
    before = state(model)
    guard, fresh = (Guard(make("tent", model, rate=0.01), model, window=20) for _ in range(2))
    first, answers = [guard(images) for images in stream()], guard.answers
    guard.reset()
    half = [guard(images) for images in stream()[:3]]
    saved = guard.state_dict()
    fresh.load_state_dict(saved)
    assert same(half + [fresh(images) for images in stream()[3:]], first)
    assert fresh.answers == answers
    assert same(state(model), before)
    with pytest.raises(AdaptationError, match="a state of the adapter bn, got one of 'tent'"):
        Guard(BN(model), model).load_state_dict(saved)


def test_a_state_that_is_not_a_guards_is_an_error_and_changes_nothing():
    guard, untouched, other = (guarded() for _ in range(3))
    first, second = stream(2)
    guard(first), untouched(first), other(second)
    state = other.state_dict()
    for spoilt in (
        {name: value for name, value in state.items() if name != "evidence"},
        state | {"verdict": {"answer": "both", "reason": ""}},
        state | {"answers": {"nobody": 3}},
        state | {"evidence": [{"source": torch.zeros(9)}]},
        state | {"adapter": state["adapter"] | {"parameters": {}}},
    ):
        with pytest.raises(AdaptationError, match=r"expected (a|the answers)"):
            guard.load_state_dict(spoilt)
        assert same(guard.state_dict(), untouched.state_dict())
    assert torch.equal(guard(second), untouched(second))


def test_the_evidence_goes_to_the_device_of_the_model():
    guard = guarded()
    guard(stream(1)[0])
    saved = guard.state_dict()
    guard.adapter.model.to("meta")
    guard.load_state_dict(saved)
    assert {evidence["source"].device.type for evidence in guard.state_dict()["evidence"]} == {"meta"}
