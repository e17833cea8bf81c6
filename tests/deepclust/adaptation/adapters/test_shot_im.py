"""SHOT-IM against a naive float64 implementation of its formula, and hand-computed cases."""

import math

import pytest
import torch
from torch import nn

from deepclust.adaptation.adapters.shot_im import ShotIM, information_loss
from deepclust.adaptation.classifier import Classifier
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import LIVELY, Naive, classifier, follows, naive_entropy, softmax, stream


def naive_loss(rows):
    predictions = [softmax(row) for row in rows]
    mean = sum(predictions) / len(predictions)
    return sum(naive_entropy(p) for p in predictions) / len(predictions) - naive_entropy(mean)


@pytest.mark.parametrize("parameters", ["affine", "all", "body", "head"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_stream_is_that_of_the_reference(parameters, steps):
    options = {"rate": 1e-2, "parameters": parameters, "steps": steps}
    follows(ShotIM(classifier(LIVELY), **options), Naive(classifier(LIVELY), naive_loss, **options), stream(6))


def test_the_defaults_adapt_the_body_at_1e_4():
    model = classifier(LIVELY)
    follows(ShotIM(model), Naive(model, naive_loss, rate=1e-4, parameters="body"), stream(5))


def test_the_loss_is_lowest_where_predictions_are_certain_and_diverse():
    certain = torch.tensor([[50.0, 0.0], [0.0, 50.0]], dtype=torch.float64)
    assert information_loss(certain).item() == pytest.approx(-math.log(2))
    assert information_loss(certain[[0, 0]]).item() == pytest.approx(0, abs=1e-12), "certain of one class alone"
    assert information_loss(certain * 0).item() == pytest.approx(0, abs=1e-12), "certain of nothing"


def test_a_class_that_nothing_speaks_for_keeps_loss_and_gradient_finite():
    logits = torch.tensor([[0.0, 0.0, -1e4], [3.0, 0.0, -1e4]], requires_grad=True)
    loss = information_loss(logits)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[:, :2].any()


def test_a_single_image_is_an_error_even_without_batch_norm():
    featurizer = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5))
    adapter = ShotIM(Classifier(featurizer, nn.Linear(5, 3)).double())
    two = stream(1)[0][:2]
    with pytest.raises(AdaptationError, match=r"at least two images a batch.*collect a larger batch"):
        adapter(two[:1])
    assert adapter(two).shape == (2, 3)
