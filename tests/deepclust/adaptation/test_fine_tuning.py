"""Fine-tuning against torch's AdamW and schedule in float64, and what it never touches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust import seeding
from deepclust.adaptation import fine_tuning
from deepclust.errors import DataError, TrainingError

CLASSES, SIDE = 3, 4


def data(count: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images whose class is which column is bright."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    images = random.integers(0, 120, (count, SIDE, SIDE, 1))
    images[np.arange(count), :, labels] += 130
    return images.astype(np.uint8), labels


def linear() -> nn.Sequential:
    with seeding.seeded("linear"):
        return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES))


def tune(model: nn.Module, images: np.ndarray, labels: np.ndarray, **changes: Any) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    options = fine_tuning.Config(**{"epochs": 2, "batch_size": 8, "rate": 0.01} | changes)
    fine_tuning.fine_tune(model, images, labels, options, generator=generator, device=torch.device("cpu"))
    return model


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 30), (3, 8)])
def test_the_steps_are_adamw_on_the_cross_entropy_with_torchs_cosine_schedule(
    monkeypatch: pytest.MonkeyPatch, epochs: int, batch_size: int
) -> None:
    monkeypatch.setattr(fine_tuning, "WEIGHT_DECAY", 0.5)  # enough to be seen in a few steps
    images, labels = data()
    truth, generator = linear().double(), torch.Generator().manual_seed(7)
    optimizer = torch.optim.AdamW(truth.parameters(), lr=0.01, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(labels) // batch_size))
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order[: len(labels) // batch_size * batch_size].split(batch_size):
            points = torch.from_numpy(images[rows.numpy()] / 255)
            optimizer.zero_grad()
            F.cross_entropy(truth(points), torch.from_numpy(labels)[rows]).backward()
            optimizer.step()
            schedule.step()
    model = tune(linear(), images, labels, epochs=epochs, batch_size=batch_size)
    for got, expected in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


class Noting(nn.Module):
    """A model that notes the first pixel of every image it sees in training, by which images can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.model = linear()
        self.seen: list[list[int]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert self.training
        self.seen.append((images[:, 0, 0, 3] * 255).round().int().tolist())
        return self.model(images)


def test_unlabelled_images_are_never_seen_and_the_others_once_an_epoch_in_the_generators_order() -> None:
    images, labels = data(24)
    images[:, 0, 3, 0] = np.arange(24)
    labels[::4] = -1
    known = np.flatnonzero(labels >= 0)
    model = Noting()
    tune(model, images, labels, epochs=2, batch_size=6)
    generator = torch.Generator().manual_seed(7)
    expected = []
    for _ in range(2):
        order = known[torch.randperm(18, generator=generator).numpy()]
        expected += [sorted(order[start : start + 6].tolist()) for start in range(0, 18, 6)]
    assert [sorted(batch) for batch in model.seen] == expected
    assert expected[0] != expected[3]


def test_every_parameter_learns_and_the_model_ends_in_eval_mode_without_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))
    model.eval().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tune(model, *data())
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_more_images_a_batch_than_there_are_takes_them_all_and_too_few_are_an_error() -> None:
    images, labels = data(10)
    large, whole = (tune(linear(), images, labels, batch_size=size)[1].weight for size in (99, 10))
    assert torch.equal(large, whole)
    labels[1:] = -1
    with pytest.raises(DataError, match="expected at least two labelled images to fine-tune on, got 1"):
        tune(linear(), images, labels)


class Broken(nn.Module):
    """Logits that are not finite from a call on, or finite ones with an infinite gradient."""

    def __init__(self, call: int, how: str) -> None:
        super().__init__()
        self.model, self.left, self.how = linear(), call, how

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.model(images)
        self.last = [parameter.detach().clone() for parameter in self.parameters()]
        self.left -= 1
        if self.left >= 0:
            return logits
        return logits * math.nan if self.how == "loss" else logits + (logits * 0).abs().sqrt()


@pytest.mark.parametrize(("how", "call"), [("loss", 0), ("gradient", 5)])  # 5 is the last of six steps
def test_what_is_not_finite_stops_before_the_step(how: str, call: int) -> None:
    images, labels = data()
    model = Broken(call, how)
    with pytest.raises(TrainingError, match=rf"fine-tuning: the {how} of step {call} is .*; lower the rate \(0.01\)"):
        tune(model, images, labels)
    assert all(torch.equal(now, last) for now, last in zip(model.parameters(), model.last, strict=True))
