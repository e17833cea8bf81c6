"""SHOT-IM against a naive float64 implementation of its formula, and hand-computed cases."""

import math

import pytest
import torch

from deepclust.adaptation.adapters.shot_im import Config, ShotIM, information_loss
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation import naive
from tests.deepclust.adaptation.nets import LIVELY, classifier, layer_normed, stream


def naive_loss(rows):
    predictions = [naive.softmax(row) for row in rows]
    mean = sum(predictions) / len(predictions)
    return sum(naive.entropy(p) for p in predictions) / len(predictions) - naive.entropy(mean)


@pytest.mark.parametrize(("parameters", "steps"), [("affine", 3), ("all", 1), ("body", 1), ("head", 1)])
def test_a_stream_is_that_of_the_reference(parameters, steps):
    options = {"rate": 1e-2, "parameters": parameters, "steps": steps}
    model = classifier(LIVELY)
    naive.follows(ShotIM(model, Config(**options)), naive.Learner(model, naive_loss, **options))


def test_the_defaults_adapt_the_body_at_1e_4():
    model = classifier(LIVELY)
    naive.follows(ShotIM(model), naive.Learner(model, naive_loss, rate=1e-4, parameters="body"))


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
    adapter, two = ShotIM(layer_normed()), stream(1)[0][:2]
    with pytest.raises(AdaptationError, match=r"at least two images a batch.*collect a larger batch"):
        adapter(two[:1])
    assert adapter(two).shape == (2, 3)
