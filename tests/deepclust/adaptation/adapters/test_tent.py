"""Tent against a naive float64 implementation of its formula, and its hand-computed entropy."""

import math

import pytest
import torch
from torch import nn

from deepclust.adaptation import Classifier
from deepclust.adaptation.adapters.tent import Config, Tent, entropy
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation import naive
from tests.deepclust.adaptation.nets import LIVELY, changed, classifier, layer_normed, stream


def naive_loss(rows):
    return sum(naive.entropy(naive.softmax(row)) for row in rows) / len(rows)


@pytest.mark.parametrize(("parameters", "steps"), [("affine", 3), ("all", 1), ("body", 1), ("head", 1)])
def test_a_stream_is_that_of_the_reference(parameters, steps):
    options = {"rate": 1e-2, "parameters": parameters, "steps": steps}
    model = classifier(LIVELY)
    naive.follows(Tent(model, Config(**options)), naive.Learner(model, naive_loss, **options))


def test_the_defaults_are_the_papers():
    model = classifier(LIVELY)
    naive.follows(Tent(model), naive.Learner(model, naive_loss, rate=1e-3, parameters="affine"))


def test_entropy_of_even_odds_is_log_two_and_of_certainty_zero():
    logits = torch.tensor([[0.0, 0.0], [0.0, 1e4], [math.log(3), 0.0]], dtype=torch.float64)
    by_hand = [math.log(2), 0.0, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    torch.testing.assert_close(entropy(logits), torch.tensor(by_hand, dtype=torch.float64))


def test_a_model_without_normalisation_is_an_error_with_the_remedy():
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), nn.Linear(4, 3)).double()
    with pytest.raises(AdaptationError, match=r"tent adapts .* none; choose other parameters, or use the source"):
        Tent(model)
    assert Tent(model, Config(parameters="body"))(stream(1)[0]).shape == (9, 3)


def test_layer_norm_alone_adapts_single_images():
    model = layer_normed()
    adapter = Tent(model)
    adapter(stream(1)[0][:1])
    assert changed(model, adapter.model) == ["featurizer.2.weight", "featurizer.2.bias"]
