"""The sums of a bank's classes: what they are, and that they stay small where there are many classes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepclust.adaptation import bank
from deepclust.adaptation.adapters import t3a
from tests.deepclust.adaptation.nets import seeded

CLASSES, MEMBERS, FEATURES = 700, 2800, 8


class Largest(TorchDispatchMode):
    """Counts the numbers in the largest tensor that is made while it lasts."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


@pytest.fixture(scope="module")
def members():
    """Features and pseudo-classes of a bank in which class 5 has no member."""
    labels = torch.randint(CLASSES, (MEMBERS,), generator=seeded(0))
    features = torch.randn((MEMBERS, FEATURES), generator=seeded(1), dtype=torch.float64)
    return features, labels.masked_fill(labels == 5, 6)


@pytest.mark.parametrize("sums", [bank.class_sums, bank.segment_sums])  # the second is what a GPU takes
def test_sums_are_those_of_each_classs_members_and_0_without_any(sums, members):
    features, labels = members
    expected = torch.stack([features[labels == k].sum(dim=0) for k in range(CLASSES)])
    torch.testing.assert_close(sums(features, labels, CLASSES), expected)
    assert not expected[5].any()


def test_prototypes_make_nothing_of_the_size_of_members_times_classes(members):
    features, labels = members
    scores, entropies = torch.zeros(MEMBERS, CLASSES), torch.zeros(MEMBERS)
    with Largest() as largest:
        bank.prototypes(bank.Bank(features, scores, labels, entropies))
        t3a.prototypes(t3a.Supports(features, labels, entropies), CLASSES)
    assert 0 < largest.numbers <= features.numel()
