"""Pseudo-labels against a naive float64 implementation of their formula."""

import pytest
import torch

from deepclust.adaptation.adapters.pseudo_label import Config, PseudoLabel
from deepclust.errors import ConfigError
from tests.deepclust.adaptation import naive
from tests.deepclust.adaptation.nets import LIVELY, classifier, stream


class NaiveLoss:
    """-log of the largest probability, where it exceeds the threshold; counts what it leaves out."""

    def __init__(self, threshold):
        self.threshold, self.left_out, self.batches_left_out = threshold, 0, 0

    def __call__(self, rows):
        largest = [max(naive.softmax(row)) for row in rows]
        losses = [-torch.log(p) for p in largest if p > self.threshold]
        self.left_out += len(rows) - len(losses)
        self.batches_left_out += not losses
        return sum(losses) / len(losses) if losses else None


@pytest.mark.parametrize(
    ("parameters", "threshold", "steps"), [("affine", 0.9, 1), ("all", 0.6, 3), ("body", 0.0, 1), ("head", 0.9, 1)]
)
def test_a_stream_is_that_of_the_reference(parameters, threshold, steps):
    options = {"rate": 1e-2, "parameters": parameters, "steps": steps}
    model, loss = classifier(LIVELY), NaiveLoss(threshold)
    adapter = PseudoLabel(model, Config(threshold=threshold, **options))
    naive.follows(adapter, naive.Learner(model, loss, **options))
    assert (loss.left_out > 0) == (threshold > 0)
    assert loss.left_out < 6 * 9 * steps


def test_batches_without_a_confident_sample_take_no_step_and_leave_adam_as_it_was():
    model, loss = classifier(LIVELY), NaiveLoss(0.97)
    options = {"rate": 1e-2, "parameters": "affine"}
    batches = stream(12, batch_size=3)
    naive.follows(PseudoLabel(model, Config(threshold=0.97, **options)), naive.Learner(model, loss, **options), batches)
    assert 0 < loss.batches_left_out < 12, "the stream has to have batches of both kinds"


def test_the_defaults_are_a_threshold_of_nine_tenths_and_tents_rate_and_parameters():
    model = classifier(LIVELY)
    naive.follows(PseudoLabel(model), naive.Learner(model, NaiveLoss(0.9), rate=1e-3, parameters="affine"))


@pytest.mark.parametrize("threshold", [1.0, -0.1, float("nan")])
def test_a_threshold_that_is_no_probability_to_exceed_is_an_error(threshold):
    with pytest.raises(ConfigError, match="threshold"):
        Config(threshold=threshold)
