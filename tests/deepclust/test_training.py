"""The loop: deterministic, stopping before harm, reporting what it did."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from deepclust import backbones, seeding, training, views
from deepclust.errors import ConfigError, TrainingError
from deepclust.methods import METHODS
from deepclust.methods.base import Method

OPTIONS: dict[str, dict[str, object]] = {
    "swav": {
        "hidden_dim": 0, "dim": 8, "prototypes": 12, "temperature": 0.1, "epsilon": 0.05,
        "sinkhorn_iterations": 3, "assign_crops": [0, 1], "freeze_prototypes_steps": 0,
    },
    "pcl": {
        "hidden_dim": 16, "dim": 8, "key_momentum": 0.9, "queue_length": 32, "temperature": 0.2,
        "clusters": [24, 30], "negatives": 8, "warmup_epochs": 1, "kmeans_iterations": 5,
    },
    "simsiam": {"hidden_dim": 16, "dim": 16, "predictor_dim": 8, "constant_predictor_rate": True},
}  # fmt: skip
CPU = torch.device("cpu")


def images(count: int = 70) -> np.ndarray:
    """Coarse patterns: two crops of one have something in common."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 1), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def build(name: str, **changes: object) -> Method:
    with seeding.seeded(0):
        backbone, dim = backbones.build("small", channels=1, image_size=16)
        return METHODS[name](backbone, dim, **(OPTIONS[name] | changes))


def recipe(**changes: object) -> training.Recipe:
    options = {
        "epochs": 2,
        "batch_size": 16,
        "rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "warmup_epochs": 0,
        "final_rate": 0.0,
        "crops": [views.Crop(count=2, size=16, scale=(0.7, 1.0))],
        "colour": views.Colour(
            flip=0.0, jitter=1.0, brightness=0.2, contrast=0.2, saturation=0.4, hue=0.1, grey=0.2, blur=0.0
        ),
        "seed": 0,
    }
    return training.Recipe(**(options | changes))  # type: ignore[arg-type]


def run(method: Method, **changes: object) -> list[training.Step]:
    steps: list[training.Step] = []
    training.train(method, images(), recipe(**changes), normalise=lambda x: x - 0.5, device=CPU, on_step=steps.append)
    return steps


@pytest.mark.parametrize("name", list(METHODS))
def test_two_runs_of_a_method_are_bit_identical_and_leave_the_global_generator_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    first, second = build(name), build(name)
    assert run(first) == run(second)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", list(METHODS))
def test_training_lowers_the_loss_of_a_method(name: str) -> None:
    # PCL stays in its warm-up: the prototypes' term changes its targets and temperatures with every E-step. And the
    # first batches are left out: against a queue of random vectors InfoNCE is easy.
    method = build(name, **({"warmup_epochs": 30} if name == "pcl" else {}))
    losses = [step.loss for step in run(method, epochs=30, seed=1)]
    assert np.mean(losses[-8:]) < np.mean(losses[8:16])


def test_another_seed_is_another_run() -> None:
    assert run(build("simsiam"), seed=0) != run(build("simsiam"), seed=1)


def test_steps_count_whole_batches_and_the_rate_falls_to_its_end() -> None:
    steps = run(build("simsiam"))
    assert [step.step for step in steps] == list(range(8))
    assert [step.epoch for step in steps] == [0] * 4 + [1] * 4
    expected = [0.1 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]
    assert [step.rate for step in steps] == pytest.approx(expected)


class Diverging(Method):
    """Its loss is NaN in the third step."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.calls = 0

    def loss(
        self, views: list[torch.Tensor], indices: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.calls += 1
        loss = self.backbone(views[0].mean().view(1, 1)).sum()
        return (loss * math.nan if self.calls == 3 else loss), {}


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    method = Diverging()
    weights: list[torch.Tensor] = []
    with pytest.raises(TrainingError, match=r"got nan in step 2 of epoch 0.*optimiser\.rate"):
        training.train(
            method,
            images(),
            recipe(),
            normalise=lambda x: x,
            device=CPU,
            on_step=lambda _: weights.append(method.backbone.weight.detach().clone()),
        )
    assert torch.equal(method.backbone.weight, weights[-1])
    assert len(weights) == 2


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        run(build("simsiam"), batch_size=71)
