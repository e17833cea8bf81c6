"""The same run on one process and on several, each with images of its own: losses, weights, queues, clusters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepclust import distributed, seeding
from deepclust.errors import PreemptedError
from deepclust.methods.parts.base import Method
from deepclust.methods.parts.options import TrainedConfig
from deepclust.models import backbones
from deepclust.training import checkpoint, loop, optim, resume, views
from tests import processes
from tests.deepclust.methods import toys

IMAGES, BATCH, EPOCHS = 83, 16, 2
RATE = 0.02
CROPS = [views.Crop(scale=(0.5, 1.0)), views.Crop(size=8, scale=(0.2, 0.5))]
CLUSTERING = ("pcl", "deepcluster_v2")  # k-means computes in float32, whatever the features are in
# Two crops where a method knows two views only.
CROPS_OF = {"swav": CROPS, "deepcluster_v2": CROPS}


def images() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Different ones everywhere: what is computed on the wrong rows shows."""
    return np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16, 1), dtype=np.uint8)


def options(name: str, rate: float) -> dict[str, Any]:
    optimiser = optim.SGD(rate=rate * optim.RATE_BATCH / BATCH, final_rate=0.001)
    return {"epochs": EPOCHS, "batch_size": BATCH, "optimiser": optimiser, "crops": CROPS_OF.get(name, CROPS[:1])}


def train(
    name: str,
    changes: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    rate: float = RATE,
    *,
    saving: resume.Saving | None = None,
) -> tuple[list[float], list[dict[str, float]], dict[str, Tensor]]:
    """Losses and logged scalars of each update, and the whole state at the end."""
    with seeding.seeded(0):
        backbone, dim = backbones.build("small", channels=1, image_size=16)
        method = toys.build(name, backbone, dim, **(options(name, rate) | changes)).to(dtype)
    steps: list[loop.Step] = []
    loop.train(
        method,
        images(),
        seed=3,
        precision="float32",
        normalise=lambda crops: ((crops - 0.5) / 0.25).to(dtype),
        device=torch.device("cpu"),
        on_step=steps.append,
        saving=saving,
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
    assert len(losses) == EPOCHS * (IMAGES // BATCH)
    results = processes.pool(world).run(train, name, changes, dtype, rate)
    their_losses, their_logged, their_state = results[0]
    for _, _, other in results[1:]:
        assert all(torch.equal(other[key], value) for key, value in their_state.items()), "not the same on all"
    assert their_losses == pytest.approx(losses, rel=losses_to, abs=losses_to)
    for ours, theirs in zip(logged, their_logged, strict=True):
        assert theirs == pytest.approx(ours, rel=10 * losses_to, abs=10 * losses_to)
    assert their_state.keys() == state.keys()
    for key, value in state.items():
        if value.is_floating_point():
            distance = (their_state[key] - value).norm() / value.norm().clamp(min=1e-2)
            assert distance < weights_to, f"{key}: {distance:.2e}"
        else:
            assert torch.equal(their_state[key], value), key


# Each way to divide a batch with another method, and each method at least once.
@pytest.mark.parametrize(
    ("name", "world", "accumulate"),
    [("swav", 2, 2), ("deepcluster_v2", 2, 1), ("moco", 4, 1), ("pcl", 2, 2), ("simsiam", 2, 1)],
)
def test_a_run_is_the_same_on_one_process_and_on_several(name: str, world: int, accumulate: int) -> None:
    to = 1e-5 if name in CLUSTERING else 1e-10
    assert_same(name, world, {"accumulate": accumulate}, torch.float64, RATE, losses_to=to, weights_to=to)


def go_on(name: str, folder: Path, *, until: int | None = None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses from where the folder's state is, until all are told to stop after some updates; then nothing is left."""
    store = checkpoint.Store(folder, fingerprint={"method": name}, keep=1)
    made: list[int] = []

    def stop() -> bool:  # one process is told, all stop
        made.append(1)
        return distributed.rank() == distributed.processes() - 1 and len(made) == until

    saving = resume.Saving(store=store, found=store.newest, every_steps=None, every_seconds=None, parts={}, stop=stop)
    try:
        losses, _, state = train(name, {}, saving=saving)
    except PreemptedError:
        return [], {}
    return losses, state


@pytest.mark.parametrize(
    ("name", "first", "stop", "second"),
    [("swav", 2, 7, 1), ("deepcluster_v2", 1, 5, 2), ("pcl", 2, 3, 4)],
)
def test_a_run_goes_on_on_another_number_of_processes(
    name: str, first: int, stop: int, second: int, tmp_path: Path
) -> None:
    def on(world: int, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
        if world == 1:
            return go_on(name, tmp_path, **options)
        results: list[tuple[list[float], dict[str, Tensor]]] = processes.pool(world).run(
            partial(go_on, name, tmp_path, **options)
        )
        return results[0]

    expected, _, state = train(name, {})
    assert on(first, until=stop) == ([], {})
    losses, found = on(second)
    to = 1e-5 if name in CLUSTERING else 1e-10
    assert losses == pytest.approx(expected[stop:], rel=to, abs=to)
    for key, value in state.items():
        torch.testing.assert_close(found[key], value, rtol=to, atol=to, msg=lambda text, key=key: f"{key}: {text}")


class Overflowing(Method):
    """The gradient of the third step is not finite on the second process."""

    def __init__(self) -> None:
        with seeding.seeded(0):
            super().__init__(nn.Linear(1, 1), TrainedConfig(**options("moco", RATE)))
        self.calls = 0

    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        loss = self.backbone(views[0].mean().view(1, 1)).float().sum() / 4
        if self.calls == 3 and distributed.rank() == 1:
            return (loss * 0).abs().sqrt(), {}  # the root of zero is zero, its gradient is not finite
        return loss, {}


def _half() -> list[float]:
    weights: list[float] = []
    method = Overflowing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "effective_precision", lambda precision, device: "fp16")
        loop.train(
            method,
            images(),
            seed=3,
            precision="float32",
            normalise=lambda crops: crops,
            device=torch.device("cpu"),
            on_step=lambda step: weights.append(float(method.backbone.weight)),
        )
    return weights


def test_with_fp16_what_overflows_on_one_process_costs_all_the_same_update() -> None:
    first, second = processes.pool(2).run(_half)
    assert first == second
    assert all(np.isfinite(first))
    assert first[1] == first[2] != first[3]
