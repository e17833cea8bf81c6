"""The optimisers against plain float64 loops, and the schedule by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deepclust.training import optim

OPTIMISERS = {"sgd": optim.SGD, "lars": optim.LARS, "larc": optim.LARS, "adamw": optim.AdamW}
SHAPES = [(4, 3), (4,), (2, 3, 2, 2), (3,)]


def settings(name: str = "sgd", **changes: Any) -> optim.Optimiser:
    own = {"trust": 0.02} if OPTIMISERS[name] is optim.LARS else {}
    return OPTIMISERS[name](**({"name": name, "rate": 0.4, "weight_decay": 1e-2} | own | changes))


def parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def gradients(seed: int, step: int) -> list[torch.Tensor]:
    """Of very different sizes, so that some tensors' local rates are clipped and others' not."""
    random = parameters(1000 * seed + step)
    return [each.detach() * 10.0 ** (number - 2) for number, each in enumerate(random)]


def reference(name: str, start: list[np.ndarray], seed: int, *, rates: list[float], decays_all: bool) -> list[Any]:
    """The published update rules, one tensor after the other."""
    weights, decay = [w.copy() for w in start], 1e-2
    first, second = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    for step, rate in enumerate(rates):
        for n, gradient in enumerate(gradient.numpy() for gradient in gradients(seed, step)):
            w = weights[n]
            plain = w.ndim == 1 and not decays_all
            wd = 0.0 if plain else decay
            if name == "adamw":
                first[n] = 0.9 * first[n] + 0.1 * gradient
                second[n] = 0.999 * second[n] + 0.001 * gradient**2
                corrected = first[n] / (1 - 0.9 ** (step + 1))
                scale = np.sqrt(second[n] / (1 - 0.999 ** (step + 1))) + 1e-8
                weights[n] = w - rate * wd * w - rate * corrected / scale
                continue
            local = 0.02 * np.linalg.norm(w) / (np.linalg.norm(gradient) + wd * np.linalg.norm(w) + 1e-8)
            factor = 1.0 if plain or name == "sgd" else local if name == "lars" else min(local / rate, 1.0)
            first[n] = 0.9 * first[n] + factor * (gradient + wd * w)
            weights[n] = w - rate * first[n]
    return weights


@pytest.mark.reference
@pytest.mark.parametrize("decays_all", [True, False])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_agrees_with_a_plain_loop(name: str, decays_all: bool, seed: int) -> None:
    ours = parameters(seed)
    start = [parameter.detach().numpy().copy() for parameter in ours]
    optimiser = optim.build(settings(name, decay_norm_and_bias=decays_all), [{"params": ours}])
    schedule = optim.Schedule(rate=0.4, final_rate=0.1, warmup_steps=3, total_steps=8)
    for step in range(8):
        optim.set_rate(optimiser, schedule, step)
        for parameter, gradient in zip(ours, gradients(seed, step), strict=True):
            parameter.grad = gradient
        optimiser.step()
    theirs = reference(name, start, seed, rates=[schedule.at(step) for step in range(8)], decays_all=decays_all)
    for ours_n, theirs_n in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(ours_n.detach().numpy(), theirs_n, rtol=1e-12)


@pytest.mark.parametrize(("weight", "gradient", "expected"), [(0.0, 1.0, -0.5), (1.0, 0.0, 1 - 0.5 * 1e-2)])
@pytest.mark.parametrize("name", ["lars", "larc"])
def test_a_tensor_without_norm_takes_the_raw_rate(name: str, weight: float, gradient: float, expected: float) -> None:
    parameter = nn.Parameter(torch.full((2, 2), weight))
    parameter.grad = torch.full((2, 2), gradient)
    optimiser = optim.build(settings(name, momentum=0.0), [{"params": [parameter]}])
    optimiser.param_groups[0]["lr"] = 0.5
    optimiser.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), expected))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_frozen_parameters_do_not_move_by_decay_or_momentum(name: str) -> None:
    frozen = parameters(0)[0]
    optimiser = optim.build(settings(name), [{"params": [frozen]}])
    frozen.grad = gradients(0, 0)[0]
    optimiser.param_groups[0]["lr"] = 0.5
    optimiser.step()
    frozen.grad = None
    before = frozen.detach().clone()
    optimiser.step()
    assert torch.equal(frozen, before)


@pytest.mark.reference
def test_the_schedule_warms_up_linearly_and_falls_by_a_cosine(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rate, final, warmup, total = draw.uniform(0.01, 5), draw.uniform(0, 0.5), *draw.integers([1, 20], [20, 60]).tolist()
    schedule = optim.Schedule(rate=rate, final_rate=final, warmup_steps=warmup, total_steps=total)
    rising = np.linspace(0, rate, warmup + 1)[1:]
    angles = np.linspace(0, np.pi, total - warmup + 1)
    falling = rate * (final + (1 - final) * np.cos(angles / 2) ** 2)
    np.testing.assert_allclose([schedule.at(step) for step in range(total + 1)], [*rising, *falling], rtol=1e-12)


def test_the_rate_grows_with_the_batch_and_the_warm_up_is_counted_in_epochs() -> None:
    schedule = optim.schedule(settings(rate=0.4, warmup_epochs=1.5), batch_size=512, epochs=10, steps_per_epoch=20)
    assert schedule == optim.Schedule(rate=0.8, final_rate=0.0, warmup_steps=30, total_steps=200)


def test_norms_and_biases_form_a_group_without_decay_and_a_constant_group_keeps_its_rate() -> None:
    matrix, bias, convolution, _ = parameters(0)
    groups = [{"params": [matrix, bias]}, {"params": [convolution], "constant_rate": True}]
    optimiser = optim.build(settings("lars", decay_norm_and_bias=False), groups)
    schedule = optim.Schedule(rate=1.0, final_rate=0.0, warmup_steps=0, total_steps=10)
    assert optim.set_rate(optimiser, schedule, 5) == 0.5
    keys = ("weight_decay", "always_adapt", "lr")
    found = [([p.ndim for p in group["params"]], *(group[key] for key in keys)) for group in optimiser.param_groups]
    assert found == [([2], 1e-2, True, 0.5), ([1], 0.0, False, 0.5), ([4], 1e-2, True, 1.0)]
