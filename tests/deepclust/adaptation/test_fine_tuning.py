"""Fine-tuning against torch's AdamW and schedule in float64, and what it never touches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust import seeding
from deepclust.adaptation import fine_tuning
from deepclust.errors import DataError, TrainingError

CLASSES, SIDE = 3, 4


def data(count=30):
    """Images whose class is which column is bright."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, count)
    images = random.integers(0, 120, (count, SIDE, SIDE, 1))
    images[np.arange(count), :, labels] += 130
    return images.astype(np.uint8), labels


def linear():
    with seeding.seeded("linear"):
        return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES))


def tune(model, images, labels, **changes):
    generator = torch.Generator().manual_seed(7)
    options = fine_tuning.Config(**{"epochs": 2, "batch_size": 8, "rate": 0.01} | changes)
    fine_tuning.fine_tune(model, images, labels, options, generator=generator, device=torch.device("cpu"))
    return model


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 22), (3, 6)])
def test_the_steps_are_adamw_on_the_labelled_images_with_torchs_cosine_schedule(monkeypatch, epochs, batch_size):
    monkeypatch.setattr(fine_tuning, "WEIGHT_DECAY", 0.5)  # enough to be seen in a few steps
    images, labels = data()
    labels[::4] = -1
    known = torch.from_numpy(np.flatnonzero(labels >= 0))
    truth, generator, steps = linear().double(), torch.Generator().manual_seed(7), len(known) // batch_size
    optimizer = torch.optim.AdamW(truth.parameters(), lr=0.01, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        order = known[torch.randperm(len(known), generator=generator)]
        for rows in order[: steps * batch_size].split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(truth(torch.from_numpy(images[rows] / 255)), torch.from_numpy(labels)[rows]).backward()
            optimizer.step()
            schedule.step()
    model = tune(linear(), images, labels, epochs=epochs, batch_size=batch_size)
    for got, expected in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


def test_every_parameter_learns_and_the_model_ends_in_eval_mode_without_gradients():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))
    model.eval().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tune(model, *data())
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_more_images_a_batch_than_there_are_takes_them_all_and_too_few_are_an_error():
    images, labels = data(10)
    large, whole = (tune(linear(), images, labels, batch_size=size)[1].weight for size in (99, 10))
    assert torch.equal(large, whole)
    labels[1:] = -1
    with pytest.raises(DataError, match="expected at least two labelled images to fine-tune on, got 1"):
        tune(linear(), images, labels)


@pytest.mark.parametrize(
    ("what", "call", "fault"),
    [
        ("loss", 0, lambda logits: logits * math.nan),
        ("gradient", 5, lambda logits: logits + (logits * 0).abs().sqrt()),  # of the last of six steps; a finite loss
    ],
)
def test_what_is_not_finite_stops_before_the_step(what, call, fault):
    model, calls = linear(), []

    def hook(module, given, logits):
        calls.append([parameter.detach().clone() for parameter in model.parameters()])
        return fault(logits) if len(calls) == call + 1 else logits

    model.register_forward_hook(hook)
    with pytest.raises(TrainingError, match=rf"fine-tuning: the {what} of step {call} is .*; lower the rate \(0.01\)"):
        tune(model, *data())
    assert all(torch.equal(now, last) for now, last in zip(model.parameters(), calls[-1], strict=True))
