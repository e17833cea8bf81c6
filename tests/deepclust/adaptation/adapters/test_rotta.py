"""RoTTA against a naive float64 implementation of its formulas, hand-computed cases, and invariants."""

import math

import pytest
import torch
from torch import nn

from deepclust.adaptation.adapters.rotta import Config, RoTTA, robust_statistics
from deepclust.adaptation.views import view
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation import naive
from tests.deepclust.adaptation.nets import CLASSES, ROLES, changed, classifier, layer_normed, seeded, stream

SHARP = {"rate": 1e-2, "memory_size": 6, "update_frequency": 5, "alpha": 0.3, "nu": 0.2}
OPTIONS = [
    {},
    SHARP | {"parameters": "all", "steps": 2, "seed": 3},
    SHARP | {"parameters": "body", "flip": False, "lambda_t": 0.2, "predict": "after"},
    SHARP | {"parameters": "head", "memory_size": 3, "lambda_u": 0.1},
]


class Reference:
    """RoTTA with a memory of one list a class and times of arrival, and statistics by loops over rows."""

    def __init__(self, model, its):
        self.student, self.teacher, self.its = naive.values(model), naive.values(model), its
        self.running = {"student": naive.running(model), "teacher": naive.running(model)}
        self.names, self.adam = ROLES[its.parameters], naive.Adam(ROLES[its.parameters], its.rate)
        self.generator = seeded(its.seed)
        self.memory = {k: [] for k in range(CLASSES)}
        self.seen = self.updates = self.replaced = self.refused = 0

    def predictions(self, images):
        return naive.logits(self.teacher, naive.inside(self.teacher, images), *self.running["teacher"])

    def __call__(self, images):
        logits = self.predictions(images)
        for image, row in zip(images, logits, strict=True):
            p = naive.softmax(row).tolist()
            self.arrive(image, p.index(max(p)), -sum(value * math.log(value) for value in p))
            self.seen += 1
            if self.seen % self.its.update_frequency == 0:
                for _ in range(self.its.steps):
                    self.update()
        return logits if self.its.predict == "before" else self.predictions(images)

    def score(self, member):
        age = self.seen - member["arrived"]
        old = 1 / (1 + math.exp(-age / self.its.memory_size))
        return self.its.lambda_t * old + self.its.lambda_u * member["entropy"] / math.log(CLASSES)

    def arrive(self, image, label, entropy):
        new = {"image": image.clone(), "label": label, "entropy": entropy, "arrived": self.seen}
        classes = [label]
        if len(self.memory[label]) < self.its.memory_size / CLASSES:
            if sum(len(members) for members in self.memory.values()) < self.its.memory_size:
                self.memory[label].append(new)
                return
            longest = max(len(members) for members in self.memory.values())
            classes = [k for k, members in self.memory.items() if len(members) == longest]
        worst = max((member for k in classes for member in self.memory[k]), key=self.score)
        if self.score(worst) <= self.score(new):
            self.refused += 1
            return
        self.replaced += 1
        self.memory[worst["label"]] = [other for other in self.memory[worst["label"]] if other is not worst]
        self.memory[label].append(new)

    def members(self):
        return sorted((m for members in self.memory.values() for m in members), key=lambda m: m["arrived"])

    def moved(self, who, p, images):
        hidden, alpha = naive.inside(p, images), self.its.alpha
        pairs = zip(self.running[who], naive.moments(hidden), strict=True)
        mean, variance = ((1 - alpha) * old + alpha * new for old, new in pairs)
        self.running[who] = (mean.detach(), variance.detach())
        return naive.logits(p, hidden, mean, variance)

    def update(self):
        members = self.members()
        images = torch.stack([member["image"] for member in members])
        taught = self.moved("teacher", self.teacher, images)
        p = naive.learning(self.student, self.names)
        said = self.moved("student", p, view(images, generator=self.generator, flip=self.its.flip))
        losses = []
        for member, target, row in zip(members, taught, said, strict=True):
            # The image that has just come counts as one step old.
            age = (self.seen - member["arrived"]) / self.its.memory_size
            weight = math.exp(-age) / (1 + math.exp(-age))
            losses.append(-weight * (naive.softmax(target) * torch.log(naive.softmax(row))).sum())
        self.student = self.adam(p, sum(losses) / len(losses))
        for name in self.names:
            self.teacher[name] = (1 - self.its.nu) * self.teacher[name] + self.its.nu * self.student[name]
        self.updates += 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_stream_is_that_of_the_reference_predictions_memory_weights_and_statistics(options):
    model, its = classifier(), Config(**options)
    adapter, reference = RoTTA(model, its), Reference(model, its)
    for images in [*stream(8), *stream(9, batch_size=1, seed=2)]:
        torch.testing.assert_close(adapter(images), reference(images))
        images.zero_()
        members = reference.members()
        assert [(m.label, m.age) for m in adapter.memory] == [
            (m["label"], reference.seen - m["arrived"]) for m in members
        ]
        for got, truth in zip(adapter.memory, members, strict=True):
            assert torch.equal(got.image, truth["image"])
            assert math.isclose(got.uncertainty, truth["entropy"], rel_tol=1e-9)
        for who, net in (("student", adapter.model), ("teacher", adapter.teacher)):
            weights = naive.values(net)
            for name, truth in getattr(reference, who).items():
                torch.testing.assert_close(weights[name], truth, atol=1e-9, rtol=1e-7)
            for got, truth in zip(naive.running(net), reference.running[who], strict=True):
                torch.testing.assert_close(got, truth)
    assert reference.updates == 81 // its.update_frequency * its.steps
    assert reference.replaced > 3
    assert reference.refused > 3 or its.lambda_u == 0.1


def test_a_layer_that_is_used_twice_moves_twice():
    norm = nn.BatchNorm1d(3)
    net = nn.Sequential(norm, nn.Linear(3, 3), norm).eval()
    with robust_statistics(net, 0.5):
        net(torch.randn((6, 3), generator=seeded(0))).sum().backward()
    assert norm.weight.grad is not None


def test_a_batch_norm_with_an_activation_of_its_own_is_normalised_too():
    class Activated(nn.BatchNorm1d):
        def forward(self, values):
            return super().forward(values).relu()

    model, activated = classifier(), classifier()
    activated.featurizer[2].__class__, activated.featurizer[3] = Activated, nn.Identity()
    plain, special = RoTTA(model, Config(**SHARP)), RoTTA(activated, Config(**SHARP))
    for images in stream(4):
        torch.testing.assert_close(special(images), plain(images))


def test_without_batch_norm_other_normalisations_learn_and_models_that_do_not_fit_are_errors():
    model = layer_normed()
    adapter = RoTTA(model, Config(**SHARP))
    for images in stream(3):
        adapter(images)
    assert changed(model, adapter.model) == ["featurizer.2.weight", "featurizer.2.bias"]
    with pytest.raises(AdaptationError, match=r"rotta adapts .* this model has none; choose other parameters"):
        RoTTA(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    model = classifier()
    model.featurizer[2] = nn.BatchNorm1d(6, track_running_stats=False).double()
    with pytest.raises(AdaptationError, match="a BatchNorm layer without any; train it with track_running_stats"):
        RoTTA(model)
