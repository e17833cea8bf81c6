"""The same run on one process and on several, each with images of its own: losses, weights, queues, clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepclust import backbones, distributed, optim, seeding, training, views
from deepclust.errors import ConfigError
from deepclust.methods import METHODS
from tests import processes
from tests.deepclust.methods.test_state import OPTIONS

IMAGES, BATCH, EPOCHS = 83, 16, 3
RATE = 0.02
# What float32 rounds differently grows by a factor in each update that depends on the rate.
SMALL_RATE = 0.001
COLOUR = views.Colour(flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2, blur=0.5)
CROPS = [views.Crop(count=2, size=16, scale=(0.5, 1.0)), views.Crop(count=2, size=8, scale=(0.2, 0.5))]
# Two crops where a method knows two views only.
CROPS_OF = {"swav": CROPS, "deepcluster_v2": CROPS}


def images() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Different ones everywhere: what is computed on the wrong rows shows."""
    return np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16, 1), dtype=np.uint8)


def recipe(name: str, *, rate: float, **changes: Any) -> training.Recipe:
    options: dict[str, Any] = {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "accumulate": 1,
        "precision": "float32",
        "optimiser": optim.Optimiser(
            name="sgd",
            rate=rate * optim.RATE_BATCH / BATCH,
            weight_decay=1e-4,
            decay_norm_and_bias=True,
            clip_norm=None,
            warmup_epochs=0,
            final_rate=0.001,
            options={"momentum": 0.9},
        ),
        "crops": CROPS_OF.get(name, CROPS[:1]),
        "colour": COLOUR,
        "seed": 3,
    }
    return training.Recipe(**(options | changes))


def train(
    name: str, changes: dict[str, Any], dtype: torch.dtype = torch.float64, rate: float = RATE
) -> tuple[list[float], list[dict[str, float]], dict[str, Tensor]]:
    """Losses and logged scalars of each update, and the whole state at the end."""
    with seeding.seeded(0):
        backbone, dim = backbones.build("small", channels=1, image_size=16)
        method = METHODS[name](backbone, dim, **OPTIONS[name]).to(dtype)
    steps: list[training.Step] = []
    training.train(
        method,
        images(),
        recipe(name, rate=rate, **changes),
        normalise=lambda crops: ((crops - 0.5) / 0.25).to(dtype),
        device=torch.device("cpu"),
        on_step=steps.append,
    )
    state = {key: value.clone() for key, value in method.state_dict().items()}
    return [step.loss for step in steps], [step.logged for step in steps], state


def assert_same(
    name: str,
    world: int,
    changes: dict[str, Any],
    dtype: torch.dtype,
    rate: float,
    *,
    losses_to: float,
    weights_to: float,
) -> None:
    losses, logged, state = train(name, changes, dtype, rate)
    assert len(losses) >= 10
    for their_losses, their_logged, their_state in processes.pool(world).run(train, name, changes, dtype, rate):
        assert their_losses == pytest.approx(losses, rel=losses_to, abs=losses_to)
        for ours, theirs in zip(logged, their_logged, strict=True):
            assert theirs == pytest.approx(ours, rel=10 * losses_to, abs=10 * losses_to)
        assert their_state.keys() == state.keys()
        for key, value in state.items():
            theirs = their_state[key]
            if value.is_floating_point():
                distance = (theirs - value).norm() / value.norm().clamp(min=1e-2)
                assert distance < weights_to, f"{key}: {distance:.2e}"
            else:
                assert torch.equal(theirs, value), key


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_the_same_on_one_process_and_on_several(name: str, world: int, accumulate: int) -> None:
    clusters = name in ("pcl", "deepcluster_v2")  # k-means computes in float32, whatever the features are in
    to = 1e-5 if clusters else 1e-10
    assert_same(name, world, {"accumulate": accumulate}, torch.float64, RATE, losses_to=to, weights_to=to)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("world", [2, 4])
def test_in_float32_a_run_differs_by_its_rounding_only(name: str, world: int) -> None:
    ten_updates = {"epochs": 2}
    assert_same(name, world, ten_updates, torch.float32, SMALL_RATE, losses_to=1e-5, weights_to=1e-4)


def _states_agree(name: str) -> bool:
    _, _, state = train(name, {})
    return all(torch.equal(distributed.broadcast(value), value) for value in state.values())


@pytest.mark.parametrize("name", METHODS)
def test_all_processes_end_with_the_same_bits(name: str) -> None:
    assert processes.pool(4).run(_states_agree, name) == [True] * 4


def _refused() -> str:
    with pytest.raises(ConfigError) as error:
        train("simsiam", {"batch_size": 18})
    return str(error.value)


def test_a_batch_that_the_processes_cannot_share_is_refused_before_any_work() -> None:
    for message in processes.pool(4).run(_refused):
        assert "expected a multiple of 4 processes" in message
