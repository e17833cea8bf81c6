"""All that outlives a step is in the state dict."""

from __future__ import annotations

import pytest
import torch

from deepclust import seeding
from deepclust.methods.parts.base import Method
from tests.deepclust.methods.toys import TRAINED, backbone, build, embedder, normal, update

IMAGES = 40


def begun(name: str, seed: int) -> Method:
    with seeding.seeded(seed):
        method: Method = build(name, backbone(norm=True), 8)
    method.check(IMAGES)
    method.bind(IMAGES)
    return method


def run(method: Method, first: int, last: int) -> list[tuple[float, dict[str, float]]]:
    """Losses and logged scalars of steps first to last, three steps an epoch, each in two parts."""
    images = normal(IMAGES, 1, 4, 4, seed=0)
    done = []
    for step in range(first, last):
        if step % 3 == 0:
            method.before_epoch(step // 3, embedder(images), step)
        indices = torch.arange(8 * (step % 5), 8 * (step % 5) + 8)
        views = [images[indices] + 0.1 * normal(8, 1, 4, 4, seed=10 * step + n) for n in range(2)]
        for loss, logged in update(method, step, views, indices, rate=0.1, parts=2, seed=step):
            done.append((float(loss), {key: float(scalar) for key, scalar in logged.items()}))
    return done


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("stop", [1, 4, 6, 11])  # in the middle of an epoch only the state can tell where it was
def test_a_method_loaded_from_its_state_goes_on_bit_for_bit(name: str, stop: int) -> None:
    straight, again = begun(name, seed=0), begun(name, seed=1)
    run(straight, 0, stop)
    again.load_state_dict(straight.state_dict())
    assert run(again, stop, 14) == run(straight, stop, 14)
    for key, tensor in straight.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
