"""T3A against a naive float64 implementation of its formulas, hand-computed cases, and invariants."""

import math

import pytest
import torch
from torch import nn

from deepclust.adaptation import Classifier
from deepclust.adaptation.adapters.t3a import T3A, Config, Supports, keep
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


@pytest.mark.parametrize(("filter_k", "predict"), [(3, "before"), (100, "after"), (None, "after")])
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
    assert (reference.dropped > 0) == (filter_k == 3), "the stream has to exercise the filter"
    assert same(state(adapter.model), weights)


def test_the_lowest_entropies_of_each_class_stay_and_older_members_win_ties():
    features = torch.arange(6.0).unsqueeze(1)
    bank = Supports(features, torch.tensor([0, 0, 1, 0, 0, 1]), torch.tensor([0.3, 0.5, 0.9, 0.4, 0.5, 0.1]))
    for filter_k, rows in ((2, [0, 3, 5, 2]), (3, [0, 3, 1, 5, 2]), (None, [0, 3, 1, 4, 5, 2])):
        assert keep(bank, filter_k=filter_k).features.squeeze(1).tolist() == rows


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
