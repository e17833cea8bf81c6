"""A small classifier in float64, a stream for it, and both written out, shared by the tests of the adapters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepclust.adaptation.base import Learner
from deepclust.adaptation.classifier import Classifier

CLASSES, FEATURES, HIDDEN, PIXELS = 4, 5, 6, 12
# A seed whose classifier finds all classes in the stream, some samples of each batch above .9 and others below.
LIVELY = 163


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier(seed: int = 0) -> Classifier:
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


def stream(batches: int = 7, batch_size: int = 9, seed: int = 1) -> list[Tensor]:
    """Batches (batch, 1, 3, 4) that drift."""
    generator = seeded(seed)
    return [
        torch.randn((batch_size, 1, 3, 4), generator=generator, dtype=torch.float64) * (1 + index / 4) + index / 5
        for index in range(batches)
    ]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def same_state(left: Any, right: Any) -> bool:
    """Whether two values of `Adapter.state_dict` are the same bit for bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_state(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same_state, left, right))
    return bool(left == right)


class Faulty(nn.Module):
    """A featurizer that can be told to fail: call number `countdown` from then on, by `fault` of its features."""

    def __init__(self, featurizer: nn.Module) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.countdown = 0
        self.fault: Callable[[Tensor], Tensor] = Tensor.clone

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.featurizer(images)
        self.countdown -= 1
        return self.fault(features) if self.countdown == 0 else features


MODULES = {
    "w1": "featurizer.1.weight",
    "b1": "featurizer.1.bias",
    "scale": "featurizer.2.weight",
    "shift": "featurizer.2.bias",
    "w2": "featurizer.4.weight",
    "b2": "featurizer.4.bias",
    "w": "head.weight",
    "b": "head.bias",
}
ROLES = {
    "all": list(MODULES),
    "affine": ["scale", "shift"],
    "body": ["w1", "b1", "scale", "shift", "w2", "b2"],
    "head": ["w", "b"],
}


def softmax(logits: Tensor) -> Tensor:
    """Probabilities (classes,) of one sample, by the definition."""
    return torch.exp(logits) / torch.exp(logits).sum()


def naive_entropy(probabilities: Tensor) -> Tensor:
    return -sum(p * torch.log(p) for p in probabilities)


class Naive:
    """What `classifier` computes with batch statistics, written out, and Adam by its own formula.

    `loss` takes a list of logits, one sample each, and returns a number, or None for no step.
    """

    def __init__(self, model: Classifier, loss: Callable[[list[Tensor]], Tensor | None], **options: Any) -> None:
        values = model.state_dict()
        self.p = {name: values[module].clone() for name, module in MODULES.items()}
        self.loss, self.rate, self.steps = loss, options["rate"], options.get("steps", 1)
        self.learning = ROLES[options["parameters"]]
        self.moments = {name: (torch.zeros_like(self.p[name]),) * 2 for name in self.learning}
        self.time = 0

    def forward(self, images: Tensor) -> Tensor:
        p = self.p
        hidden = images.flatten(1) @ p["w1"].T + p["b1"]
        mean = hidden.sum(dim=0) / len(hidden)
        variance = ((hidden - mean) ** 2).sum(dim=0) / len(hidden)
        hidden = (hidden - mean) / torch.sqrt(variance + 1e-5) * p["scale"] + p["shift"]
        features = hidden.clamp(min=0) @ p["w2"].T + p["b2"]
        return features @ p["w"].T + p["b"]

    def step(self, images: Tensor) -> Tensor:
        for name in self.learning:
            self.p[name] = self.p[name].detach().requires_grad_(True)
        logits = self.forward(images)
        loss = self.loss(list(logits))
        if loss is None:
            return logits.detach()
        gradients = torch.autograd.grad(loss, [self.p[name] for name in self.learning])
        self.time += 1
        for name, gradient in zip(self.learning, gradients, strict=True):
            first, second = self.moments[name]
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            self.moments[name] = (first, second)
            corrected = first / (1 - 0.9**self.time), second / (1 - 0.999**self.time)
            self.p[name] = (self.p[name] - self.rate * corrected[0] / (corrected[1].sqrt() + 1e-8)).detach()
        return logits.detach()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits from before the first step."""
        first, *_ = [self.step(images) for _ in range(self.steps)]
        return first


def follows(adapter: Learner, reference: Naive, batches: list[Tensor]) -> None:
    """Assert that predictions and weights of an adapter are the reference's all along a stream."""
    start = state(adapter.model)
    for images in batches:
        torch.testing.assert_close(adapter(images), reference(images), rtol=0, atol=1e-9)
        weights = adapter.model.state_dict()
        for name, module in MODULES.items():
            torch.testing.assert_close(weights[module], reference.p[name].detach(), rtol=0, atol=1e-9)
    for name, module in MODULES.items():
        # What the first bias adds, batch statistics take away again: nothing but rounding reaches it.
        assert torch.equal(weights[module], start[module]) == (name not in reference.learning) or name == "b1"
