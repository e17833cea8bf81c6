"""ROID against a naive float64 implementation of its formulas, hand-computed cases, and invariants."""

import math

import pytest
import torch

from deepclust.adaptation.adapters.roid import ROID, Config, correct_prior, sample_weights, soft_likelihood_ratio
from deepclust.adaptation.views import view
from tests.deepclust.adaptation import naive
from tests.deepclust.adaptation.nets import CLASSES, ROLES, changed, classifier, layer_normed, seeded, stream

OPTIONS = [
    {},
    {"rate": 1e-2, "parameters": "all", "prior_correction": "logits", "seed": 4, "momentum": 0.8, "temperature": 0.5},
    {"rate": 1e-2, "parameters": "head", "momentum": 1.0, "steps": 3},
    {"rate": 1e-2, "parameters": "body", "prior_correction": "none", "flip": False, "predict": "after"},
]


class Reference:
    """ROID in loops over samples and classes."""

    def __init__(self, model, its):
        self.p, self.source, self.its = naive.values(model), naive.values(model), its
        self.names, self.adam = ROLES[its.parameters], naive.Adam(ROLES[its.parameters], its.rate)
        self.generator, self.mean, self.left_out = seeded(its.seed), [1 / CLASSES] * CLASSES, 0

    def __call__(self, images):
        before = self.mean
        first, *_ = [self.step(images, before) for _ in range(self.its.steps)]
        return self.corrected(naive.forward(self.p, images) if self.its.predict == "after" else first)

    def step(self, images, mean):
        p = naive.learning(self.p, self.names)
        logits = naive.forward(p, images)
        viewed = naive.forward(p, view(images, generator=self.generator, flip=self.its.flip))
        scores = [naive.softmax(row) for row in logits]
        weights = self.weights([score.tolist() for score in scores], mean)
        losses = []
        for weight, score, row in zip(weights, scores, viewed, strict=True):
            other, ratio, agreement = naive.softmax(row), 0, 0
            for k in range(CLASSES):
                value = score[k] if score[k] <= 0.99 else torch.tensor(0.99, dtype=torch.float64)
                ratio = ratio - value * torch.log(value / (1 - value) + 1e-5)
                agreement = agreement - (score[k] * torch.log(other[k]) + other[k] * torch.log(score[k])) / 2
            losses.append(weight * (ratio + agreement))
        self.p = self.adam(p, sum(losses) / len(losses))
        for name in self.names:
            self.p[name] = self.its.momentum * self.p[name] + (1 - self.its.momentum) * self.source[name]
        batch = [sum(score[k].item() for score in scores) / len(scores) for k in range(CLASSES)]
        self.mean = [0.9 * old + 0.1 * new for old, new in zip(mean, batch, strict=True)]
        return logits.detach()

    def weights(self, scores, mean):
        diversity, certainty = [], []
        for score in scores:
            product = sum(left * right for left, right in zip(score, mean, strict=True))
            diversity.append(1 - product / (math.hypot(*score) * math.hypot(*mean)))
            certainty.append(sum(value * math.log(value) for value in score))
        scaled = [
            [(v - min(values)) / (max(values) - min(values)) for v in values] for values in (diversity, certainty)
        ]
        cut = sum(scaled[0]) / len(scores)
        self.left_out += sum(value < cut for value in scaled[0])
        return [
            0.0 if diverse < cut else math.exp(diverse * certain / self.its.temperature)
            for diverse, certain in zip(*scaled, strict=True)
        ]

    def corrected(self, logits):
        scores = [naive.softmax(row).tolist() for row in logits]
        prior = [sum(score[k] for score in scores) / len(scores) for k in range(CLASSES)]
        smooth = max(1 / len(scores), 1 / CLASSES) / max(prior)
        prior = torch.tensor([(value + smooth) / (1 + smooth * CLASSES) for value in prior], dtype=torch.float64)
        how = self.its.prior_correction
        return logits * prior if how == "logits" else logits + prior.log() if how == "probabilities" else logits


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_stream_is_that_of_the_reference_predictions_mean_and_weights(options):
    model, its = classifier(), Config(**options)
    adapter, reference = ROID(model, its), Reference(model, its)
    for images in stream(6):
        torch.testing.assert_close(adapter(images), reference(images), atol=1e-8, rtol=1e-6)
        assert adapter.mean_prediction.tolist() == pytest.approx(reference.mean, rel=1e-9)
        naive.close(adapter.model, reference.p)
    assert reference.left_out > 10


def test_certain_images_teach_nothing():
    certain = torch.tensor([[0.995, 0.004, 0.001]], dtype=torch.float64).log()
    by_hand = -sum(v * math.log(v / (1 - v) + 1e-5) for v in (0.99, 0.004, 0.001))
    assert soft_likelihood_ratio(certain).item() == pytest.approx(by_hand, abs=1e-9)
    sure = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    soft_likelihood_ratio(sure).sum().backward()
    assert sure.grad.abs().max() < 1e-20


def test_images_that_are_alike_count_the_same_and_the_prior_of_fewer_than_classes_is_smoothed_by_hand():
    for count in (1, 4):
        weights = sample_weights(torch.tensor([[2.0, 1.0, 0.0]] * count), torch.ones(3) / 3, temperature=1 / 3)
        assert weights.tolist() == [1.0] * count
    p = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
    # Prior (.7, .3); smooth = (1/1) / .7; smoothed (.7 + 1/.7, .3 + 1/.7) / (1 + 2/.7).
    prior = correct_prior(p.log(), how="probabilities").exp()[0] / p[0]
    assert prior.tolist() == pytest.approx([(value + 1 / 0.7) / (1 + 2 / 0.7) for value in (0.7, 0.3)])


def test_one_image_will_do_without_batch_norm_and_two_of_which_one_is_left_out_with_it():
    model = layer_normed()
    adapter = ROID(model, Config(rate=1e-2))
    assert adapter(stream(1)[0][:1]).shape == (1, 3)
    assert changed(model, adapter.model) == ["featurizer.2.weight", "featurizer.2.bias"]
    assert all(torch.isfinite(ROID(classifier())(images)).all() for images in stream(3, batch_size=2))
