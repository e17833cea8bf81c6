"""The net of `nets.classifier` and Adam once more, by their formulas, for the references of the adapters' tests."""

import torch

from tests.deepclust.adaptation.nets import MODULES, ROLES, stream


def values(model):
    """Weights by their names here."""
    state = model.state_dict()
    return {name: state[module].clone() for name, module in MODULES.items()}


def running(model):
    """BatchNorm's running mean and variance."""
    norm = model.featurizer[2]
    return norm.running_mean.clone(), norm.running_var.clone()


def inside(p, images):
    """What BatchNorm is given."""
    return images.flatten(1) @ p["w1"].T + p["b1"]


def moments(hidden):
    mean = sum(hidden) / len(hidden)
    return mean, sum((row - mean) ** 2 for row in hidden) / len(hidden)


def features(p, hidden, mean, variance, mask=1):
    """Features of what BatchNorm is given, by these statistics; the mask is dropout's."""
    normalised = (hidden - mean) / torch.sqrt(variance + 1e-5) * p["scale"] + p["shift"]
    return normalised.clamp(min=0) * mask @ p["w2"].T + p["b2"]


def logits(p, hidden, mean, variance):
    return features(p, hidden, mean, variance) @ p["w"].T + p["b"]


def forward(p, images):
    """Logits by the batch's own statistics."""
    hidden = inside(p, images)
    return logits(p, hidden, *moments(hidden))


def softmax(row):
    exponentials = torch.exp(row - row.max())
    return exponentials / exponentials.sum()


def entropy(probabilities):
    return -sum(p * torch.log(p) for p in probabilities)


class Adam:
    def __init__(self, names, rate):
        self.rate, self.time, self.moments = rate, 0, dict.fromkeys(names, (0.0, 0.0))

    def __call__(self, p, loss):
        """Weights after a step; those that learn must ask for gradients in `p`."""
        gradients = torch.autograd.grad(loss, [p[name] for name in self.moments], allow_unused=True)
        self.time += 1
        after = {name: value.detach() for name, value in p.items()}
        for (name, (first, second)), gradient in zip(self.moments.items(), gradients, strict=True):
            if gradient is not None:
                first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
                self.moments[name] = first, second
                first, second = first / (1 - 0.9**self.time), second / (1 - 0.999**self.time)
                after[name] = after[name] - self.rate * first / (second.sqrt() + 1e-8)
        return after


def learning(p, names):
    """Weights of which those of these names ask for gradients."""
    return {name: value.clone().requires_grad_(name in names) for name, value in p.items()}


def close(model, p):
    """Assert that a model's weights are these, except what only rounding moves.

    What the first bias adds, batch statistics take away again: its gradient is rounding, which Adam enlarges.
    """
    for name, value in values(model).items():
        if name != "b1":
            torch.testing.assert_close(value, p[name], rtol=0, atol=1e-9)


class Learner:
    """An adapter with batch statistics. `loss` takes a list of logits, one sample each; None is no step."""

    def __init__(self, model, loss, *, rate, parameters, steps=1):
        self.p, self.loss, self.steps = values(model), loss, steps
        self.names, self.adam = ROLES[parameters], Adam(ROLES[parameters], rate)

    def step(self, images):
        p = learning(self.p, self.names)
        found = forward(p, images)
        loss = self.loss(list(found))
        if loss is not None:
            self.p = self.adam(p, loss)
        return found.detach()

    def __call__(self, images):
        """Logits from before the first step."""
        first, *_ = [self.step(images) for _ in range(self.steps)]
        return first


def follows(adapter, reference, batches=None):
    """Assert that predictions and weights of an adapter are the reference's all along a stream."""
    start = values(adapter.model)
    for images in stream(6) if batches is None else batches:
        torch.testing.assert_close(adapter(images), reference(images), rtol=0, atol=1e-9)
        close(adapter.model, reference.p)
    moved = {name for name, value in values(adapter.model).items() if not torch.equal(value, start[name])}
    assert moved - {"b1"} == set(reference.names) - {"b1"}
