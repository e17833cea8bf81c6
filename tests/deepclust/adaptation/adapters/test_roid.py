"""ROID against a naive float64 implementation of its formulas, hand-computed cases, and invariants."""

import math

import pytest
import torch
from torch import nn

from deepclust.adaptation.adapters.bn import BN
from deepclust.adaptation.adapters.roid import (
    ROID,
    correct_prior,
    sample_weights,
    soft_likelihood_ratio,
    symmetric_cross_entropy,
)
from deepclust.adaptation.views import view
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation import naive
from tests.deepclust.adaptation.nets import CLASSES, ROLES, classifier, same, seeded, state, stream

OPTIONS = [
    {},
    {"rate": 1e-2, "momentum": 0.8, "temperature": 0.5},
    {"rate": 1e-2, "parameters": "all", "prior_correction": "logits", "seed": 4},
    {"rate": 1e-2, "parameters": "body", "prior_correction": "none", "flip": False},
    {"rate": 1e-2, "parameters": "head", "momentum": 1.0, "steps": 3},
    {"rate": 1e-2, "predict": "after", "momentum": 0.5},
]


class Reference:
    """ROID in loops over samples and classes."""

    def __init__(
        self,
        model,
        *,
        rate=1e-3,
        parameters="affine",
        momentum=0.99,
        temperature=1 / 3,
        prior_correction="probabilities",
        flip=True,
        seed=0,
        steps=1,
        predict="before",
    ):
        self.p, self.source = naive.values(model), naive.values(model)
        self.names, self.adam = ROLES[parameters], naive.Adam(ROLES[parameters], rate)
        self.momentum, self.temperature, self.correction = momentum, temperature, prior_correction
        self.flip, self.steps, self.predict, self.generator = flip, steps, predict, seeded(seed)
        self.mean = [1 / CLASSES] * CLASSES
        self.left_out = 0

    def __call__(self, images):
        before, first = self.mean, None
        for _ in range(self.steps):
            logits = self.step(images, before)
            first = logits if first is None else first
        if self.predict == "after":
            first = self.forward(self.p, images)
        return self.corrected(first)

    @staticmethod
    def forward(p, images):
        hidden = naive.inside(p, images)
        return naive.logits(p, hidden, *naive.moments(hidden))

    def step(self, images, mean):
        p = naive.learning(self.p, self.names)
        logits = self.forward(p, images)
        viewed = self.forward(p, view(images, generator=self.generator, flip=self.flip))
        scores = [naive.softmax(row) for row in logits]
        weights = self.weights([score.tolist() for score in scores], mean)
        losses = []
        for weight, score, row in zip(weights, scores, viewed, strict=True):
            other = naive.softmax(row)
            ratio = 0
            for k in range(CLASSES):
                value = score[k] if score[k] <= 0.99 else torch.tensor(0.99, dtype=torch.float64)
                ratio = ratio - value * torch.log(value / (1 - value) + 1e-5)
            agreement = -0.5 * sum(
                score[k] * torch.log(other[k]) + other[k] * torch.log(score[k]) for k in range(CLASSES)
            )
            losses.append(weight * (ratio + agreement))
        self.p = self.adam(p, sum(losses) / len(losses))
        for name in self.names:
            self.p[name] = self.momentum * self.p[name] + (1 - self.momentum) * self.source[name]
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
            0.0 if diverse < cut else math.exp(diverse * certain / self.temperature)
            for diverse, certain in zip(*scaled, strict=True)
        ]

    def corrected(self, logits):
        scores = [naive.softmax(row).tolist() for row in logits]
        prior = [sum(score[k] for score in scores) / len(scores) for k in range(CLASSES)]
        smooth = max(1 / len(scores), 1 / CLASSES) / max(prior)
        prior = [(value + smooth) / (1 + smooth * CLASSES) for value in prior]
        if self.correction == "logits":
            return torch.stack([torch.stack([row[k] * prior[k] for k in range(CLASSES)]) for row in logits])
        if self.correction == "probabilities":
            return torch.stack([torch.stack([row[k] + math.log(prior[k]) for k in range(CLASSES)]) for row in logits])
        return logits


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_stream_is_that_of_the_reference_predictions_mean_and_weights(options):
    model = classifier()
    adapter, reference = ROID(model, **options), Reference(model, **options)
    for images in stream(7):
        torch.testing.assert_close(adapter(images), reference(images), atol=1e-8, rtol=1e-6)
        assert adapter.mean_prediction.tolist() == pytest.approx(reference.mean, rel=1e-9)
        weights = naive.values(adapter.model)
        for name, truth in reference.p.items():
            torch.testing.assert_close(weights[name], truth, atol=1e-9, rtol=1e-7)
    assert reference.left_out > 10
    changed = {name for name, value in weights.items() if not torch.equal(value, reference.source[name])}
    assert changed == set(ROLES[options.get("parameters", "affine")])


def test_the_soft_likelihood_ratio_is_that_of_its_formula_and_certain_images_teach_nothing():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.995, 0.004, 0.001]], dtype=torch.float64)
    logits = p.log().requires_grad_()
    got = soft_likelihood_ratio(logits)
    # ε in the logarithm is worth 2e-5 here.
    assert got[0].item() == pytest.approx(-sum(v * math.log(v / (1 - v)) for v in (0.5, 0.3, 0.2)), abs=1e-4)
    certain = -sum(v * math.log(v / (1 - v) + 1e-5) for v in (0.99, 0.004, 0.001))
    assert got[1].item() == pytest.approx(certain, abs=1e-9)
    got.sum().backward()
    assert torch.isfinite(logits.grad).all()
    sure = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    soft_likelihood_ratio(sure).sum().backward()
    assert sure.grad.abs().max() < 1e-20


def test_the_cross_entropy_is_symmetric_and_that_of_its_formula():
    left, right = (torch.randn((3, 4), generator=seeded(seed), dtype=torch.float64) for seed in (0, 1))
    got = symmetric_cross_entropy(left, right)
    torch.testing.assert_close(got, symmetric_cross_entropy(right, left))
    p, q = left.softmax(dim=1), right.softmax(dim=1)
    truth = [-sum((p[i, k] * q[i, k].log() + q[i, k] * p[i, k].log()) / 2 for k in range(4)) for i in range(3)]
    torch.testing.assert_close(got, torch.stack(truth))


def test_certain_images_of_rare_classes_weigh_most_and_common_ones_nothing():
    p = torch.tensor([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.1, 0.8, 0.1]], dtype=torch.float64)
    weights = sample_weights(p.log(), torch.tensor([0.9, 0.05, 0.05], dtype=torch.float64), temperature=1 / 3)
    # The second is the most diverse and as certain as the first: exp(1 · 1 / τ).
    assert weights.tolist()[0] == 0
    assert weights[1].item() == pytest.approx(math.exp(3))
    assert weights[1] > weights[2] >= 1


@pytest.mark.parametrize("count", [1, 4])
def test_images_that_are_all_alike_count_the_same(count):
    weights = sample_weights(torch.tensor([[2.0, 1.0, 0.0]] * count), torch.ones(3) / 3, temperature=1 / 3)
    assert weights.tolist() == [1.0] * count


def test_the_weights_are_ensembled_with_the_sources_by_hand():
    # A gradient step of Adam on a scale is the rate, up to its ε; 0.75 of that is left.
    images = stream(1)[0]
    free, held = (ROID(classifier(), rate=1e-2, momentum=momentum) for momentum in (1.0, 0.75))
    free(images), held(images)
    source = classifier().featurizer[2].weight
    steps = free.model.featurizer[2].weight - source
    torch.testing.assert_close(steps.abs().max(), torch.tensor(1e-2, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(held.model.featurizer[2].weight, source + 0.75 * steps)
    bound = ROID(classifier(), momentum=0.0)
    for batch in stream(3):
        bound(batch)
    assert same(state(bound.model), state(ROID(classifier()).model))


def test_the_prior_is_corrected_by_hand():
    p = torch.tensor([[0.7, 0.3], [0.9, 0.1]], dtype=torch.float64)
    # Prior (.8, .2); smooth = (1/2) / .8 = .625; smoothed (1.425, .825) / 2.25.
    prior = (1.425 / 2.25, 0.825 / 2.25)
    for row, got in zip(p, correct_prior(p.log(), how="probabilities").softmax(dim=1), strict=True):
        total = row[0] * prior[0] + row[1] * prior[1]
        assert got[0].item() == pytest.approx((row[0] * prior[0] / total).item())
    torch.testing.assert_close(correct_prior(p.log(), how="logits"), p.log() * torch.tensor(prior, dtype=torch.float64))
    assert torch.equal(correct_prior(p.log(), how="none"), p.log())
    # Fewer images than classes: prior (.7, .3); smooth = (1/1) / .7; smoothed (.7 + 1/.7, .3 + 1/.7) / (1 + 2/.7).
    alone = correct_prior(p[:1].log(), how="probabilities").exp()[0] / p[0]
    assert alone.tolist() == pytest.approx([(value + 1 / 0.7) / (1 + 2 / 0.7) for value in (0.7, 0.3)])


def test_a_correction_of_probabilities_does_not_depend_on_a_constant_in_the_logits():
    logits = torch.randn((6, 4), generator=seeded(0), dtype=torch.float64)
    straight, shifted = (correct_prior(logits + add, how="probabilities").softmax(dim=1) for add in (0, 5))
    torch.testing.assert_close(straight, shifted)
    straight, shifted = (correct_prior(logits + add, how="logits").softmax(dim=1) for add in (0, 5))
    assert (straight - shifted).abs().max() > 0.05


def test_a_single_image_keeps_its_class_and_a_larger_correlated_batch_pulls_harder():
    logits = torch.tensor([[1.0, 0.9, 0.0]], dtype=torch.float64)
    assert correct_prior(logits, how="probabilities").argmax() == 0
    doubtful = torch.tensor([0.2, 0.0, 0.0], dtype=torch.float64)
    pulls = []
    for count in (1, 3, 30):
        batch = torch.cat([doubtful.unsqueeze(0), torch.tensor([[0.0, 5.0, 0.0]] * count, dtype=torch.float64)])
        after = correct_prior(batch, how="probabilities")[0]
        pulls.append((after[1] - after[0]).item())
    assert pulls == sorted(pulls)
    assert pulls[-1] > 0


def test_the_first_batch_is_predicted_as_bn_does_but_for_the_prior():
    images = stream(1)[0]
    torch.testing.assert_close(ROID(classifier(), prior_correction="none")(images), BN(classifier())(images))


def test_two_runs_are_equal_and_reset_and_state_resume_bit_for_bit():
    model = classifier()
    before = torch.get_rng_state()
    batches, options = stream(8), {"rate": 1e-2, "steps": 2}
    adapter, other = ROID(model, **options), ROID(model, **options)
    truth = [adapter(images) for images in batches]
    assert all(torch.equal(other(images), logits) for images, logits in zip(batches, truth, strict=True))
    adapter.reset()
    assert adapter.mean_prediction is None
    assert all(torch.equal(adapter(images), logits) for images, logits in zip(batches, truth, strict=True))
    adapter.reset()
    for images in batches[:3]:
        adapter(images)
    saved = adapter.state_dict()
    for images in batches[3:]:
        adapter(images)
    resumed = ROID(model, **options)
    resumed.load_state_dict(saved)
    assert all(torch.equal(resumed(images), logits) for images, logits in zip(batches[3:], truth[3:], strict=True))
    assert same(state(resumed.model), state(adapter.model))
    assert torch.equal(torch.get_rng_state(), before)


def test_episodic_batches_do_not_depend_on_each_other():
    adapter, fresh = (ROID(classifier(), rate=1e-2, episodic=episodic) for episodic in (True, False))
    first, second = stream(2)
    adapter(first)
    assert torch.equal(adapter(second), fresh(second))


def test_another_seed_is_another_view():
    results = []
    for seed in (0, 1):
        adapter = ROID(classifier(), rate=1e-2, seed=seed)
        results.append([adapter(images) for images in stream(3)][-1])
    assert not torch.equal(*results)


def test_one_image_is_an_error_with_batch_norm_and_fine_without():
    image = stream(1)[0][:1]
    with pytest.raises(AdaptationError, match="at least two images a batch"):
        ROID(classifier())(image)
    layers = nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4)
    adapter = ROID(nn.Sequential(*layers).double(), rate=1e-2)
    before = adapter.model.model[2].bias.detach().clone()
    assert adapter(image).shape == (1, 4)
    assert not torch.equal(adapter.model.model[2].bias, before)


def test_two_images_of_which_one_is_left_out_are_enough():
    adapter = ROID(classifier())
    for images in stream(3, batch_size=2):
        assert torch.isfinite(adapter(images)).all()


def test_options_states_and_models_that_do_not_fit_are_errors():
    for options, message in [
        ({"momentum": 1.1}, "momentum from 0 to 1 and a temperature above 0, got 1.1 and"),
        ({"temperature": 0}, "got 0.99 and 0"),
        ({"prior_correction": "yes"}, "one of probabilities, logits, none; got 'yes'"),
    ]:
        with pytest.raises(AdaptationError, match=message):
            ROID(classifier(), **options)
    with pytest.raises(AdaptationError, match="this model has none; choose other parameters"):
        ROID(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    adapter = ROID(classifier())
    adapter(stream(1)[0])
    spoilt = adapter.state_dict()
    spoilt["mean_prediction"] = torch.ones(5)
    with pytest.raises(AdaptationError, match=r"expected mean_prediction of shape \(4,\) in the state, got \(5,\)"):
        adapter.load_state_dict(spoilt)
