"""A small classifier in float64 and a stream for it, shared by the tests of the adapters."""

import torch
from torch import Tensor, nn

from deepclust.adaptation.classifier import Classifier

CLASSES, FEATURES, HIDDEN, PIXELS = 4, 5, 6, 12


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
