"""T3A against a naive float64 implementation of its formulas, hand-computed cases, and invariants."""

import math

import pytest
import torch
from torch import nn

from deepclust.adaptation import Classifier, Source
from deepclust.adaptation.adapters.t3a import T3A, Config, Supports, keep, prototypes
from tests.deepclust.adaptation import naive
from tests.deepclust.adaptation.nets import CLASSES, LIVELY, classifier, same, seeded, state, stream


class Reference:
    """T3A in loops over samples and classes; each class has a list of (entropy, unit feature)."""

    def __init__(self, model, *, filter_k, predict):
        self.model, self.filter_k, self.predict = model.eval(), filter_k, predict
        self.weight, self.bias = model.head.weight.detach(), model.head.bias.detach()
        self.members = [[(self.judge(row)[1], self.unit(row))] for row in self.weight]
        self.dropped = 0

    def judge(self, feature):
        """Pseudo-class and entropy of a feature by the source head."""
        scores = [sum(w * z for w, z in zip(row, feature, strict=True)) for row in self.weight]
        p = naive.softmax(torch.stack(scores) + self.bias)
        return p.tolist().index(max(p.tolist())), naive.entropy(p).item()

    @staticmethod
    def unit(vector):
        return vector / math.sqrt(sum(value.item() ** 2 for value in vector))

    def remember(self, features):
        for feature in features:
            label, entropy = self.judge(feature)
            self.members[label].append((entropy, self.unit(feature)))
        for k in range(CLASSES):
            self.members[k].sort(key=lambda member: member[0])
            if self.filter_k is not None:
                self.dropped += len(self.members[k][self.filter_k :])
                self.members[k] = self.members[k][: self.filter_k]

    def logits(self, features):
        templates = [self.unit(sum(feature for _, feature in members)) for members in self.members]
        return torch.stack([torch.stack([(feature * c).sum() for c in templates]) for feature in features])

    def __call__(self, images):
        features = self.model.featurizer(images).detach()
        before = self.logits(features)
        self.remember(features)
        return before if self.predict == "before" else self.logits(features)


@pytest.mark.parametrize(("filter_k", "predict"), [(3, "before"), (1, "after"), (100, "after"), (None, "after")])
def test_a_stream_is_that_of_the_reference_predictions_and_bank(filter_k, predict):
    options = {"filter_k": filter_k, "predict": predict}
    # The default predicts with the batch in the bank, which keeps 100.
    adapter = T3A(classifier(LIVELY), None if filter_k == 100 else Config(**options))
    reference = Reference(classifier(LIVELY), **options)
    weights = state(adapter.model)
    for images in stream(6):
        torch.testing.assert_close(adapter(images), reference(images), rtol=0, atol=1e-9)
        members = [(k, *member) for k in range(CLASSES) for member in reference.members[k]]
        assert adapter.bank.labels.tolist() == [label for label, _, _ in members]
        assert adapter.bank.entropies.tolist() == pytest.approx([entropy for _, entropy, _ in members], abs=1e-9)
        features = torch.stack([feature for _, _, feature in members])
        torch.testing.assert_close(adapter.bank.features, features, rtol=0, atol=1e-9)
    assert (reference.dropped > 0) == (filter_k in (1, 3)), "the stream has to exercise the filter"
    assert same(state(adapter.model), weights)


def test_before_the_first_batch_the_prototypes_are_the_heads_unit_rows():
    model, images = classifier(LIVELY), stream(1)[0]
    rows = model.head.weight.detach()
    unit = rows / rows.square().sum(dim=1, keepdim=True).sqrt()
    logits = T3A(model, Config(predict="before"))(images)
    torch.testing.assert_close(logits, model.featurizer(images).detach() @ unit.T)


def test_running_statistics_normalise_so_that_single_images_do():
    images = stream(1)[0]
    whole, one_by_one = (T3A(classifier(LIVELY), Config(filter_k=None)) for _ in range(2))
    whole(images)
    for image in images:
        one_by_one(image.unsqueeze(0))
    torch.testing.assert_close(whole.bank.features, one_by_one.bank.features)
    assert torch.equal(whole.bank.labels, one_by_one.bank.labels)


def test_the_lowest_entropies_of_each_class_stay_and_older_members_win_ties():
    features = torch.arange(6.0).unsqueeze(1)
    bank = Supports(features, torch.tensor([0, 0, 1, 0, 0, 1]), torch.tensor([0.3, 0.5, 0.9, 0.4, 0.5, 0.1]))
    two, three, everything = (keep(bank, filter_k=k) for k in (2, 3, None))
    assert two.features.squeeze(1).tolist() == [0, 3, 5, 2]
    assert two.labels.tolist() == [0, 0, 1, 1]
    assert three.features.squeeze(1).tolist() == [0, 3, 1, 5, 2]
    assert everything.features.squeeze(1).tolist() == [0, 3, 1, 4, 5, 2]


def test_prototypes_are_sums_of_members_scaled_to_length_one():
    unit = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    length = math.hypot(1.6, 0.8)
    expected = torch.tensor([[1.6 / length, 0.8 / length], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(prototypes(Supports(unit, torch.tensor([0, 0, 1]), torch.zeros(3)), 2), expected)


@pytest.mark.parametrize("filter_k", [1, None])
def test_every_class_keeps_a_member_and_a_finite_logit_even_if_the_head_gives_its_row_to_another(filter_k):
    head = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        # The second row is a tenth of the first: the head takes it, and whatever lies that way, for the first class.
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.1, 0.0], [0.0, 1.0]]))
    adapter, generator = T3A(Classifier(nn.Flatten(), head), Config(filter_k=filter_k)), seeded(0)
    for _ in range(10):
        logits = adapter(torch.rand(8, 1, 2, 1, generator=generator))
        assert torch.isfinite(logits).all()
        assert logits.shape == (8, 3)
        assert adapter.bank.labels.unique().tolist() == [0, 1, 2]
    assert adapter.bank.features[adapter.bank.labels == 1].tolist() == [[1.0, 0.0]]


def test_features_that_move_together_are_followed():
    # Two classes along the axes; at test time everything is turned by 40 degrees, which the head gets wrong.
    head = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.eye(2) * 5)
    angle, generator = math.radians(40), seeded(0)
    labels = torch.randint(2, (200,), generator=generator)
    angles = angle + labels * math.pi / 2 + 0.25 * torch.randn(200, generator=generator, dtype=torch.float64)
    images = torch.stack([angles.cos(), angles.sin()], dim=1)
    model = Classifier(nn.Flatten(), head)
    adapter = T3A(model, Config(filter_k=None))
    adapted = torch.cat([adapter(batch) for batch in images.split(50)])
    wrong = [(logits.argmax(dim=1) != labels).sum().item() for logits in (Source(model)(images), adapted)]
    assert wrong[1] < wrong[0] / 2
