"""The loop: deterministic, stopping before harm, reporting what it did; the same for a batch in parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepclust import seeding
from deepclust.errors import ConfigError, TrainingError
from deepclust.methods.parts.base import Embed, Method
from deepclust.methods.parts.options import TrainedConfig
from deepclust.models import backbones
from deepclust.training import loop
from deepclust.training.optim import SGD
from deepclust.training.views import Colour
from tests.deepclust.methods import toys

CPU = torch.device("cpu")
CONFIG = TrainedConfig(epochs=2, batch_size=16, optimiser=SGD(rate=1.6))


def images(count: int = 70) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Coarse patterns: two crops of one have something in common."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 1), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def build(name: str, **changes: Any) -> Method:
    with seeding.seeded(0):
        method: Method = toys.build(name, *backbones.build("small", channels=1, image_size=16), **changes)
        return method


def run(
    method: Method,
    on_step: Callable[[loop.Step], None] = lambda _: None,
    *,
    seed: int = 0,
    precision: loop.optim.Precision = "float32",
) -> list[loop.Step]:
    steps: list[loop.Step] = []

    def note(step: loop.Step) -> None:
        steps.append(step)
        on_step(step)

    how = {"seed": seed, "precision": precision, "device": CPU}
    loop.train(method, images(), normalise=lambda x: x - 0.5, on_step=note, **how)  # type: ignore[arg-type]
    return steps


def same(first: Method, second: Method) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", toys.TRAINED)
def test_two_runs_of_a_method_are_bit_identical_and_leave_the_global_generator_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    first, second = build(name), build(name)
    assert run(first) == run(second)
    assert same(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert run(build(name), seed=1) != run(build(name))


@pytest.mark.parametrize("name", toys.TRAINED)
def test_training_lowers_the_loss_of_a_method(name: str) -> None:
    # Of PCL the warm-up counts: the prototypes' term changes its targets and temperatures with every E-step. And the
    # first batches are left out: against a queue of random vectors InfoNCE is easy.
    weak = {"colour": Colour(flip=0, brightness=0.2, contrast=0.2, blur=0), "hidden_dim": 16, "dim": 8, "epochs": 16}
    method = build(name, **weak, **({"warmup_epochs": 15} if name == "pcl" else {}))
    losses = [step.loss for step in run(method, seed=1)]
    assert np.mean(losses[52:60]) < np.mean(losses[8:16])


def test_steps_count_whole_batches_and_the_rate_falls_to_its_end() -> None:
    steps = run(build("simsiam"))
    assert [step.step for step in steps] == list(range(8))
    assert [step.epoch for step in steps] == [0] * 4 + [1] * 4
    expected = [0.1 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]
    assert [step.rate for step in steps] == pytest.approx(expected)


class Recording(Method):
    """A method without batch normalisation, in float64, that notes what is called."""

    def __init__(self, **changes: Any) -> None:
        with seeding.seeded(0):
            backbone = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        super().__init__(backbone, CONFIG.replaced(**changes))
        self.calls: list[str] = []

    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls.append(f"loss of {len(indices)}")
        first, second = (self.backbone(view.double()) for view in views)
        loss = ((first - second) ** 2).sum(1).mean() + (first**2 - 1).abs().mean()
        return loss, {"mean": first.detach().mean().float()}

    def check(self, images: int) -> None:
        self.calls.append(f"check {images}")

    def bind(self, images: int) -> None:
        self.calls.append(f"bind {images}")

    def before_epoch(self, epoch: int, embed: Embed, seed: int) -> None:
        self.calls.append(f"epoch {epoch}")

    def before_step(self, step: int) -> None:
        self.calls.append(f"before {step}")

    def after_step(self, step: int) -> None:
        self.calls.append(f"after {step}")


def test_a_batch_in_parts_is_the_same_update_as_the_whole_batch() -> None:
    whole, parts = Recording(), Recording(accumulate=4)
    for a, b in zip(run(whole), run(parts), strict=True):
        assert (a.loss, a.gradient_norm, a.logged["mean"]) == pytest.approx(
            (b.loss, b.gradient_norm, b.logged["mean"]), rel=1e-6
        )
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_the_hooks_are_called_once_an_update_however_many_parts_it_has() -> None:
    method = Recording(accumulate=2, epochs=1)
    run(method)
    steps = [call for n in range(4) for call in (f"before {n}", "loss of 8", "loss of 8", f"after {n}")]
    assert method.calls == ["check 70", "bind 70", "epoch 0", *steps]


def test_the_gradient_norm_is_the_whole_gradients_and_clipping_limits_the_update_only() -> None:
    method = Recording(optimiser=SGD(rate=1.6, clip_norm=0.01, weight_decay=0.0))
    start = nn.utils.parameters_to_vector(method.parameters()).detach()
    weights: list[Tensor] = []
    steps = run(method, lambda _: weights.append(nn.utils.parameters_to_vector(method.parameters()).detach()))
    assert steps[0].gradient_norm == pytest.approx(run(Recording())[0].gradient_norm)
    assert steps[0].gradient_norm > 0.01
    assert float((weights[0] - start).norm()) == pytest.approx(steps[0].rate * 0.01, rel=1e-3)


def test_a_norm_that_is_never_reached_changes_no_bit() -> None:
    free, bounded = build("simsiam"), build("simsiam", optimiser=SGD(rate=1.6, clip_norm=1e9))
    assert run(free) == run(bounded)
    assert same(free, bounded)


def test_half_precision_on_a_cpu_is_float32_bit_for_bit() -> None:
    full, *half = (build("simsiam") for _ in range(3))
    assert run(full) == run(half[0], precision="bf16") == run(half[1], precision="fp16")
    assert same(full, half[0])


def test_bf16_is_used_only_on_a_gpu_that_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for supported, expected in [(True, "bf16"), (False, "float32")]:
        # By emulation every GPU claims it.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s or including_emulation
        )
        assert loop.effective_precision("bf16", gpu) == expected
        assert loop.effective_precision("fp16", gpu) == "fp16"
        assert loop.effective_precision("float32", gpu) == "float32"
        assert loop.effective_precision("bf16", CPU) == "float32"


class Breaking(Method):
    """Loss or gradient is not finite in the third step."""

    def __init__(self, part: str) -> None:
        super().__init__(nn.Linear(1, 1), CONFIG)
        self.part = part
        self.calls = 0

    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        loss = self.backbone(views[0].mean().view(1, 1)).float().sum() / 4  # small enough for fp16, scaled
        if self.calls != 3:
            return loss, {}
        # The root of zero is zero, its gradient is not finite.
        return (loss * math.nan if self.part == "loss" else (loss * 0).abs().sqrt()), {}


def run_breaking(method: Breaking) -> list[tuple[loop.Step, Tensor]]:
    done: list[tuple[loop.Step, Tensor]] = []
    try:
        run(method, lambda step: done.append((step, method.backbone.weight.detach().clone())))
    finally:
        assert torch.equal(method.backbone.weight, done[-1][1])
    return done


@pytest.mark.parametrize(
    ("part", "name", "precision"),
    [("loss", "loss", "float32"), ("gradient", "gradient norm", "float32"), ("loss", "loss", "fp16")],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(
    part: str, name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "effective_precision", lambda *_: precision)
    method = Breaking(part)
    message = rf"expected a finite {name}, got nan in step 2 of epoch 0.*optimiser\.rate"
    with pytest.raises(TrainingError, match=message):
        run_breaking(method)
    assert method.calls == 3


def test_with_fp16_a_gradient_that_is_not_finite_costs_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    unscaled = run(Recording())[0].gradient_norm
    monkeypatch.setattr(loop, "effective_precision", lambda *_: "fp16")
    done = run_breaking(Breaking("gradient"))
    assert len(done) == 8
    weights = [weight for _, weight in done]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert [math.isfinite(step.gradient_norm) for step, _ in done] == [True, True, False, *[True] * 5]
    assert run(Recording())[0].gradient_norm == pytest.approx(unscaled, rel=1e-3)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size: .* 70; got 71"):
        run(build("simsiam", batch_size=71))
