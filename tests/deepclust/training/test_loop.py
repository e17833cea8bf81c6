"""The loop: deterministic, stopping before harm, reporting what it did; the same for a batch in parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepclust import seeding
from deepclust.errors import ConfigError, TrainingError
from deepclust.methods.parts.base import Method
from deepclust.methods.parts.options import TrainedConfig
from deepclust.models import backbones
from deepclust.training import loop
from deepclust.training.optim import SGD
from tests.deepclust.methods import toys

CONFIG = TrainedConfig(epochs=2, batch_size=16, optimiser=SGD(rate=1.6))


def build(name: str, **changes: Any) -> Method:
    with seeding.seeded(0):
        method: Method = toys.build(name, *backbones.build("small", channels=1, image_size=16), **changes)
        return method


def run(
    method: Method, on_step: Callable[[loop.Step], Any] = str, *, seed: int = 0, precision: str = "float32"
) -> list[loop.Step]:
    """Its steps on coarse patterns: two crops of one have something in common."""
    coarse = np.random.default_rng(0).integers(0, 256, (70, 2, 2, 1), dtype=np.uint8)
    images, steps = coarse.repeat(8, axis=1).repeat(8, axis=2), list[loop.Step]()

    def note(step: loop.Step) -> None:
        steps.append(step)
        on_step(step)

    how: dict[str, Any] = {"seed": seed, "precision": precision, "device": torch.device("cpu")}
    loop.train(method, images, normalise=lambda x: x - 0.5, on_step=note, **how)
    return steps


def same(first: Method, second: Method) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", toys.TRAINED)
def test_two_runs_of_whole_batches_are_bit_identical_and_leave_the_global_generator_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    first, second = build(name), build(name)
    steps = run(first)
    assert steps == run(second) != run(build(name), seed=1)
    assert same(first, second)
    assert [(step.step, step.epoch) for step in steps] == [(n, n // 4) for n in range(8)]
    assert [step.rate for step in steps] == pytest.approx([0.1 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)])
    assert torch.equal(torch.random.get_rng_state(), before)


class Recording(Method):
    """A method without batch normalisation, in float64, that notes what is called."""

    def __init__(self, **changes: Any) -> None:
        with seeding.seeded(0):
            backbone = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        super().__init__(backbone, CONFIG.replaced(**changes))
        self.calls: list[str] = []
        for hook in ("check", "bind", "before_epoch", "before_step", "after_step"):
            setattr(self, hook, lambda number, *_, hook=hook: self.calls.append(f"{hook} {number}"))

    def loss(self, views: list[Tensor], indices: Tensor, _: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls.append(f"loss of {len(indices)}")
        first, second = (self.backbone(view.double()) for view in views)
        loss = ((first - second) ** 2).sum(1).mean() + (first**2 - 1).abs().mean()
        return loss, {"mean": first.detach().mean().float()}


def test_a_batch_in_parts_is_the_same_update_as_the_whole_batch() -> None:
    whole, parts = Recording(), Recording(accumulate=4)
    found = [[(a.loss, a.gradient_norm, a.logged["mean"]) for a in run(method)] for method in (whole, parts)]
    np.testing.assert_allclose(*found, rtol=1e-6)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_the_hooks_are_called_once_an_update_however_many_parts_it_has() -> None:
    method = Recording(accumulate=2, epochs=1)
    run(method)
    steps = [call for n in range(4) for call in (f"before_step {n}", "loss of 8", "loss of 8", f"after_step {n}")]
    assert method.calls == ["check 70", "bind 70", "before_epoch 0", *steps]


def test_the_gradient_norm_is_the_whole_gradients_and_clipping_limits_the_update_only() -> None:
    method = Recording(optimiser=SGD(rate=1.6, clip_norm=0.01, weight_decay=0.0))
    vector = lambda _: nn.utils.parameters_to_vector(method.parameters()).detach()  # noqa: E731
    start, weights = vector(None), list[Tensor]()
    steps = run(method, lambda step: weights.append(vector(step)))
    assert steps[0].gradient_norm == pytest.approx(run(Recording())[0].gradient_norm)
    assert steps[0].gradient_norm > 0.01
    assert float((weights[0] - start).norm()) == pytest.approx(steps[0].rate * 0.01, rel=1e-3)


@pytest.mark.parametrize(("clip_norm", "precision"), [(1e9, "float32"), (None, "bf16"), (None, "fp16")])
def test_half_precision_on_a_cpu_and_a_norm_never_reached_change_no_bit(clip_norm: Any, precision: str) -> None:
    plain, changed = build("simsiam"), build("simsiam", optimiser=SGD(rate=1.6, clip_norm=clip_norm))
    assert run(plain) == run(changed, precision=precision)
    assert same(plain, changed)


@pytest.mark.parametrize(("supported", "used"), [(True, "bf16"), (False, "float32")])
def test_bf16_is_used_only_on_a_gpu_that_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, supported: bool, used: loop.optim.Precision
) -> None:
    # By emulation every GPU claims it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    expected = {"bf16": used, "fp16": "fp16", "float32": "float32"}
    assert {name: loop.effective_precision(name, torch.device("cuda")) for name in expected} == expected  # type: ignore[arg-type]


class Breaking(Method):
    """Loss or gradient is not finite in the third step."""

    def __init__(self, part: str) -> None:
        super().__init__(nn.Linear(1, 1), CONFIG)
        self.part = part
        self.calls = 0

    def loss(self, views: list[Tensor], indices: Tensor, _: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        loss = self.backbone(views[0].mean().view(1, 1)).float().sum() / 4  # small enough for fp16, scaled
        if self.calls != 3:
            return loss, {}
        # The root of zero is zero, its gradient is not finite.
        return (loss * math.nan if self.part == "loss" else (loss * 0).abs().sqrt()), {}


def run_breaking(method: Breaking) -> list[tuple[loop.Step, Tensor]]:
    done = list[tuple[loop.Step, Tensor]]()
    try:
        run(method, lambda step: done.append((step, method.backbone.weight.detach().clone())))
    finally:
        assert torch.equal(method.backbone.weight, done[-1][1])
    return done


@pytest.mark.parametrize(("part", "precision"), [("loss", "float32"), ("gradient norm", "float32"), ("loss", "fp16")])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(
    part: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "effective_precision", lambda *_: precision)
    method = Breaking(part)
    with pytest.raises(TrainingError, match=rf"a finite {part}, got nan in step 2 of epoch 0.*optimiser\.rate"):
        run_breaking(method)
    assert method.calls == 3


def test_with_fp16_a_gradient_that_is_not_finite_costs_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    unscaled = run(Recording())[0].gradient_norm
    monkeypatch.setattr(loop, "effective_precision", lambda *_: "fp16")
    done = run_breaking(Breaking("gradient norm"))
    moved = [not torch.equal(now, before) for (_, before), (_, now) in itertools.pairwise(done[:4])]
    assert moved == [True, False, True]
    assert [math.isfinite(step.gradient_norm) for step, _ in done] == [True, True, False, *[True] * 5]
    assert run(Recording())[0].gradient_norm == pytest.approx(unscaled, rel=1e-3)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size: .* 70; got 71"):
        run(build("simsiam", batch_size=71))
