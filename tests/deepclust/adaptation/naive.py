"""The net of `nets.classifier` and Adam once more, by their formulas, for the references of the adapters' tests."""

import torch

from tests.deepclust.adaptation.nets import MODULES


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


def logits(p, hidden, mean, variance):
    """Logits of what BatchNorm is given, by these statistics."""
    normalised = (hidden - mean) / torch.sqrt(variance + 1e-5) * p["scale"] + p["shift"]
    return (normalised.clamp(min=0) @ p["w2"].T + p["b2"]) @ p["w"].T + p["b"]


def softmax(row):
    exponentials = torch.exp(row - row.max())
    return exponentials / exponentials.sum()


class Adam:
    def __init__(self, names, rate):
        self.names, self.rate, self.time = names, rate, 0
        self.first, self.second = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)

    def __call__(self, p, loss):
        """Weights after a step; those that learn must ask for gradients in `p`."""
        gradients = torch.autograd.grad(loss, [p[name] for name in self.names])
        self.time += 1
        after = {name: value.detach() for name, value in p.items()}
        for name, gradient in zip(self.names, gradients, strict=True):
            self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
            self.second[name] = 0.999 * self.second[name] + 0.001 * gradient**2
            first, second = self.first[name] / (1 - 0.9**self.time), self.second[name] / (1 - 0.999**self.time)
            after[name] = after[name] - self.rate * first / (second.sqrt() + 1e-8)
        return after


def learning(p, names):
    """Weights of which those of these names ask for gradients."""
    return {name: value.clone().requires_grad_(name in names) for name, value in p.items()}
