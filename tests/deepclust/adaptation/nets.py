"""A small classifier in float64 and a stream for it, shared by the tests of the adapters."""

import torch
from torch import Tensor, nn

from deepclust import seeding
from deepclust.adaptation import ADAPTERS, Classifier

CLASSES, FEATURES, HIDDEN, PIXELS = 4, 5, 6, 12
# A seed whose classifier finds all classes in the stream, some samples of each batch above .9 and others below.
LIVELY = 163

MODULES = {
    "w1": "featurizer.1.weight", "b1": "featurizer.1.bias", "scale": "featurizer.2.weight",
    "shift": "featurizer.2.bias", "w2": "featurizer.4.weight", "b2": "featurizer.4.bias",
    "w": "head.weight", "b": "head.bias",
}  # fmt: skip
BODY = ["w1", "b1", "scale", "shift", "w2", "b2"]
ROLES = {"all": list(MODULES), "affine": ["scale", "shift"], "body": BODY, "head": ["w", "b"]}


def make(name, model, **options):
    """An adapter by its name and options."""
    return ADAPTERS[name](model, ADAPTERS[name].config_class(**options))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def classifier(seed=0):
    """Linear, BatchNorm, ReLU, linear; then the head. BatchNorm has statistics and weights far from 0 and 1."""
    featurizer = nn.Sequential(
        nn.Flatten(), nn.Linear(PIXELS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, FEATURES)
    )
    model = Classifier(featurizer, nn.Linear(FEATURES, CLASSES)).double()
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
        norm = featurizer[2]
        norm.running_mean.copy_(torch.randn(HIDDEN, generator=generator, dtype=torch.float64))
        norm.running_var.copy_(torch.rand(HIDDEN, generator=generator, dtype=torch.float64) + 0.5)
    return model.eval()


def layer_normed(classes=3):
    """A classifier without BatchNorm."""
    with seeding.seeded("layer normed"):
        featurizer = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES), nn.LayerNorm(FEATURES))
        return Classifier(featurizer, nn.Linear(FEATURES, classes)).double()


def stream(batches=7, batch_size=9, seed=1):
    """Batches (batch, 1, 3, 4) that drift."""
    generator = seeded(seed)
    return [
        torch.randn((batch_size, 1, 3, 4), generator=generator, dtype=torch.float64) * (1 + index / 4) + index / 5
        for index in range(batches)
    ]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left, right):
    """Whether two states, of models or adapters, are the same bit for bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def changed(before, after):
    """Names of the values that are not the same in two models of one kind."""
    weights = before.state_dict()
    return [name for name, value in after.state_dict().items() if not torch.equal(value, weights[name])]


class Faulty(nn.Module):
    """A featurizer that can be told to fail: call number `countdown` from then on, by `fault` of its features."""

    def __init__(self, featurizer):
        super().__init__()
        self.featurizer = featurizer
        self.countdown = 0
        self.fault = Tensor.clone

    def forward(self, images):
        features = self.featurizer(images)
        self.countdown -= 1
        return self.fault(features) if self.countdown == 0 else features
