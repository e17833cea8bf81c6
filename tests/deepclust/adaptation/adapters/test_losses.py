"""Source, BN, Tent, SHOT-IM and pseudo-labels against their formulas in float64, and hand-computed cases."""

import math

import pytest
import torch
from torch import nn

from deepclust.adaptation import Classifier, Source
from deepclust.adaptation.adapters.shot_im import information_loss
from deepclust.adaptation.adapters.tent import entropy
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation import naive
from tests.deepclust.adaptation.nets import LIVELY, changed, classifier, layer_normed, make, same, state, stream


@pytest.mark.parametrize("name", ["source", "bn"])
def test_predictions_are_those_of_the_formula_on_every_batch_and_nothing_is_kept(name):
    model = classifier()
    adapter, p = make(name, model), naive.values(model)
    before = state(adapter.model)
    for images in stream(6):
        hidden = naive.inside(p, images)
        statistics = naive.moments(hidden) if name == "bn" else naive.running(model)
        torch.testing.assert_close(adapter(images), naive.logits(p, hidden, *statistics), rtol=0, atol=1e-12)
    assert same(state(adapter.model), before)


def mean(values):
    return sum(values) / len(values)


def tent(rows):
    return mean([naive.entropy(naive.softmax(row)) for row in rows])


def shot_im(rows):
    predictions = [naive.softmax(row) for row in rows]
    return mean([naive.entropy(p) for p in predictions]) - naive.entropy(mean(predictions))


class PseudoLabel:
    """-log of the largest probability, where it exceeds the threshold; counts the confident samples of each batch."""

    def __init__(self, threshold):
        self.threshold, self.confident = threshold, []

    def __call__(self, rows):
        losses = [-torch.log(max(p)) for p in map(naive.softmax, rows) if max(p) > self.threshold]
        self.confident.append(len(losses))
        return mean(losses) if losses else None


AFFINE, BODY = {"rate": 1e-3, "parameters": "affine"}, {"rate": 1e-4, "parameters": "body"}


@pytest.mark.parametrize(
    ("name", "loss", "stated", "means"),
    [
        ("tent", tent, {}, AFFINE),
        ("tent", tent, {"rate": 1e-2, "parameters": "all", "steps": 3}, {}),
        ("tent", tent, {"rate": 1e-2, "parameters": "head"}, {}),
        ("shot_im", shot_im, {}, BODY),
        ("shot_im", shot_im, {"rate": 1e-2, "parameters": "all", "steps": 3}, {}),
        ("pseudo_label", PseudoLabel(0.9), {}, AFFINE),
        ("pseudo_label", PseudoLabel(0.6), {"threshold": 0.6, "rate": 1e-2, "parameters": "body", "steps": 3}, {}),
    ],
)
def test_a_stream_is_that_of_the_reference_with_the_defaults_and_without(name, loss, stated, means):
    options = {key: value for key, value in (stated | means).items() if key != "threshold"}
    model = classifier(LIVELY)
    naive.follows(make(name, model, **stated), naive.Learner(model, loss, **options))


def test_batches_without_a_confident_sample_take_no_step_and_leave_adam_as_it_was():
    model, loss = classifier(LIVELY), PseudoLabel(0.97)
    adapter = make("pseudo_label", model, threshold=0.97, rate=1e-2)
    naive.follows(adapter, naive.Learner(model, loss, rate=1e-2, parameters="affine"), stream(12, batch_size=3))
    assert {*loss.confident} == {0, 1}, "the stream has to have batches of both kinds"


def test_losses_by_hand():
    odds = torch.tensor([[0.0, 0.0], [0.0, 1e4], [math.log(3), 0.0]], dtype=torch.float64)
    by_hand = [math.log(2), 0.0, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    assert entropy(odds).tolist() == pytest.approx(by_hand)
    certain = torch.tensor([[50.0, 0.0], [0.0, 50.0]], dtype=torch.float64)
    for logits, loss in ((certain, -math.log(2)), (certain[[0, 0]], 0), (certain * 0, 0)):
        assert information_loss(logits).item() == pytest.approx(loss, abs=1e-12)
    impossible = torch.tensor([[0.0, 0.0, -1e4], [3.0, 0.0, -1e4]], requires_grad=True)
    information_loss(impossible).backward()
    assert torch.isfinite(impossible.grad).all()
    assert impossible.grad[:, :2].any()


def test_models_without_batch_norm_adapt_single_images_where_the_loss_allows_it():
    model, images = layer_normed(), stream(1)[0]
    adapter = make("tent", model)
    adapter(images[:1])
    assert changed(model, adapter.model) == ["featurizer.2.weight", "featurizer.2.bias"]
    adapter = make("shot_im", model)
    with pytest.raises(AdaptationError, match=r"at least two images a batch.*collect a larger batch"):
        adapter(images[:1])
    assert adapter(images[:2]).shape == (2, 3)
    plain = Classifier(nn.Flatten(), nn.Linear(12, 3)).double()
    torch.testing.assert_close(Source(plain)(images[:1]), plain(images)[:1].detach())
    for name, remedy in (("bn", "BatchNorm layers.*use the"), ("tent", "none; choose other parameters, or use the")):
        with pytest.raises(AdaptationError, match=rf"{name} .*{remedy} source adapter"):
            make(name, plain)
