"""Pseudo-labels against a naive float64 implementation of their formula."""

import pytest
import torch

from deepclust.adaptation.adapters.bn import BN
from deepclust.adaptation.adapters.pseudo_label import PseudoLabel
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import LIVELY, Naive, classifier, follows, same_state, softmax, stream


class NaiveLoss:
    """-log of the largest probability, where it exceeds the threshold; counts what it leaves out."""

    def __init__(self, threshold):
        self.threshold, self.left_out, self.batches_left_out = threshold, 0, 0

    def __call__(self, rows):
        largest = [max(softmax(row)) for row in rows]
        losses = [-torch.log(p) for p in largest if p > self.threshold]
        self.left_out += len(rows) - len(losses)
        self.batches_left_out += not losses
        return sum(losses) / len(losses) if losses else None


@pytest.mark.parametrize("parameters", ["affine", "all", "body", "head"])
@pytest.mark.parametrize(("threshold", "steps"), [(0.9, 1), (0.6, 3), (0.0, 1)])
def test_a_stream_is_that_of_the_reference(parameters, threshold, steps):
    options = {"rate": 1e-2, "parameters": parameters, "steps": steps}
    loss = NaiveLoss(threshold)
    follows(
        PseudoLabel(classifier(LIVELY), threshold=threshold, **options),
        Naive(classifier(LIVELY), loss, **options),
        stream(6),
    )
    assert (loss.left_out > 0) == (threshold > 0)
    assert loss.left_out < 6 * 9 * steps


def test_batches_without_a_confident_sample_take_no_step_and_leave_adam_as_it_was():
    loss = NaiveLoss(0.97)
    options = {"rate": 1e-2, "parameters": "affine"}
    batches = stream(12, batch_size=3)
    follows(
        PseudoLabel(classifier(LIVELY), threshold=0.97, **options), Naive(classifier(LIVELY), loss, **options), batches
    )
    assert 0 < loss.batches_left_out < 12, "the stream has to have batches of both kinds"


def test_nothing_is_learnt_above_every_confidence():
    adapter, bn = PseudoLabel(classifier(LIVELY), threshold=0.999999), BN(classifier(LIVELY))
    before = adapter.state_dict()
    for images in stream(5):
        assert torch.equal(adapter(images), bn(images))
    assert same_state(adapter.state_dict(), before)


def test_the_defaults_are_a_threshold_of_nine_tenths_and_tents_rate_and_parameters():
    model = classifier(LIVELY)
    follows(PseudoLabel(model), Naive(model, NaiveLoss(0.9), rate=1e-3, parameters="affine"), stream(5))


@pytest.mark.parametrize("threshold", [1.0, -0.1, float("nan")])
def test_a_threshold_that_is_no_probability_to_exceed_is_an_error(threshold):
    with pytest.raises(AdaptationError, match=f"threshold from 0 to below 1.*got {threshold}"):
        PseudoLabel(classifier(LIVELY), threshold=threshold)
