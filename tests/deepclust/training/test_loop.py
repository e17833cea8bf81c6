"""The loop: deterministic, stopping before harm, reporting what it did; the same for a batch in parts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepclust import seeding
from deepclust.errors import ConfigError, TrainingError
from deepclust.methods import METHODS, method_class
from deepclust.methods.parts.base import Embed, Method
from deepclust.models import backbones
from deepclust.training import loop, optim, views

_MOCO: dict[str, Any] = {
    "hidden_dim": 16, "dim": 8, "key_momentum": 0.9, "queue_length": 32, "temperature": 0.2, "key_groups": 4,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "swav": {
        "hidden_dim": 0, "dim": 8, "prototypes": [12], "temperature": 0.1, "epsilon": 0.05, "sinkhorn_iterations": 3,
        "assign_crops": [0, 1], "freeze_prototypes_steps": 0, "hard_assignment_steps": 0, "queue_length": 0,
        "queue_start_epoch": 0,
    },
    "deepcluster_v2": {
        "hidden_dim": 0, "dim": 8, "prototypes": [12], "temperature": 0.1, "assign_crops": [0, 1],
        "kmeans_iterations": 5, "kmeans_engine": "faiss", "kmeans_restarts": 1,
    },
    "moco": _MOCO,
    "pcl": _MOCO | {
        "clusters": [24, 30], "negatives": 8, "warmup_epochs": 1, "kmeans_iterations": 5,
        "kmeans_engine": "faiss", "kmeans_restarts": 1, "kmeans_every": 1, "kmeans_warm_start": False,
        "spherical": False,
    },
    "simsiam": {
        "hidden_dim": 16, "dim": 16, "projector_layers": 2, "predictor_dim": 8, "constant_predictor_rate": True,
        "zero_init_residual": False,
    },
}  # fmt: skip
CPU = torch.device("cpu")


def images(count: int = 70) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Coarse patterns: two crops of one have something in common."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 1), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def build(name: str, **changes: Any) -> Method:
    with seeding.seeded(0):
        backbone, dim = backbones.build("small", channels=1, image_size=16)
        return method_class(name)(backbone, dim, **(OPTIONS[name] | changes))


def optimiser(**changes: Any) -> optim.Optimiser:
    options: dict[str, Any] = {
        "name": "sgd",
        "rate": 0.1 * optim.RATE_BATCH / 16,
        "weight_decay": 1e-4,
        "decay_norm_and_bias": True,
        "clip_norm": None,
        "warmup_epochs": 0,
        "final_rate": 0.0,
        "options": {"momentum": 0.9},
    }
    return optim.Optimiser(**(options | changes))


def recipe(**changes: Any) -> loop.Recipe:
    options: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 16,
        "accumulate": 1,
        "precision": "float32",
        "optimiser": optimiser(),
        "crops": [views.Crop(count=2, size=16, scale=(0.7, 1.0))],
        "colour": views.Colour(
            flip=0.0, jitter=1.0, brightness=0.2, contrast=0.2, saturation=0.4, hue=0.1, grey=0.2, blur=0.0
        ),
        "seed": 0,
    }
    return loop.Recipe(**(options | changes))


def run(method: Method, **changes: Any) -> list[loop.Step]:
    steps: list[loop.Step] = []
    loop.train(method, images(), recipe(**changes), normalise=lambda x: x - 0.5, device=CPU, on_step=steps.append)
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
    losses = [step.loss for step in run(method, epochs=15, seed=1)]
    assert np.mean(losses[-8:]) < np.mean(losses[8:16])


def test_another_seed_is_another_run() -> None:
    assert run(build("simsiam"), seed=0) != run(build("simsiam"), seed=1)


def test_steps_count_whole_batches_and_the_rate_falls_to_its_end() -> None:
    steps = run(build("simsiam"))
    assert [step.step for step in steps] == list(range(8))
    assert [step.epoch for step in steps] == [0] * 4 + [1] * 4
    expected = [0.1 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]
    assert [step.rate for step in steps] == pytest.approx(expected)


class Recording(Method):
    """A method without batch normalisation, in float64, that notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        with seeding.seeded(0):
            self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, 4)).double()
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
    whole, parts = Recording(), Recording()
    whole_steps, parts_steps = run(whole), run(parts, accumulate=4)
    for a, b in zip(whole_steps, parts_steps, strict=True):
        assert (a.loss, a.gradient_norm, a.logged["mean"]) == pytest.approx(
            (b.loss, b.gradient_norm, b.logged["mean"]), rel=1e-6
        )
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_hooks_are_called_once_an_update_however_many_parts_it_has() -> None:
    method = Recording()
    run(method, accumulate=2, epochs=1)
    steps = [call for n in range(4) for call in (f"before {n}", "loss of 8", "loss of 8", f"after {n}")]
    assert method.calls == ["check 70", "bind 70", "epoch 0", *steps]


def test_the_gradient_norm_is_the_whole_gradients_and_clipping_limits_the_update_only() -> None:
    method = Recording()
    start = [parameter.detach().clone() for parameter in method.parameters()]
    moved: list[float] = []

    def note(_: loop.Step) -> None:
        if not moved:
            changes = [p.detach() - s for p, s in zip(method.parameters(), start, strict=True)]
            moved.append(math.sqrt(sum(float((change**2).sum()) for change in changes)))

    settings = optimiser(clip_norm=0.01, weight_decay=0.0)
    steps: list[loop.Step] = []
    loop.train(
        method,
        images(),
        recipe(optimiser=settings),
        normalise=lambda x: x - 0.5,
        device=CPU,
        on_step=lambda step: (steps.append(step), note(step))[1],
    )
    assert steps[0].gradient_norm == pytest.approx(run(Recording())[0].gradient_norm)
    assert steps[0].gradient_norm > 0.01
    assert moved[0] == pytest.approx(steps[0].rate * 0.01, rel=1e-3)


def test_a_norm_that_is_never_reached_changes_no_bit() -> None:
    free, bounded = build("simsiam"), build("simsiam")
    assert run(free) == run(bounded, optimiser=optimiser(clip_norm=1e9))
    assert all(torch.equal(a, b) for a, b in zip(free.parameters(), bounded.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_a_cpu_is_float32_bit_for_bit(precision: str) -> None:
    full, half = build("simsiam"), build("simsiam")
    assert run(full) == run(half, precision=precision)
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), half.parameters(), strict=True))


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
        super().__init__()
        self.backbone = nn.Linear(1, 1)
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
        loop.train(
            method,
            images(),
            recipe(),
            normalise=lambda x: x,
            device=CPU,
            on_step=lambda step: done.append((step, method.backbone.weight.detach().clone())),
        )
    finally:
        assert torch.equal(method.backbone.weight, done[-1][1])
    return done


@pytest.mark.parametrize(("part", "name"), [("loss", "loss"), ("gradient", "gradient norm")])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(part: str, name: str) -> None:
    method = Breaking(part)
    message = rf"expected a finite {name}, got nan in step 2 of epoch 0.*optimiser\.rate"
    with pytest.raises(TrainingError, match=message):
        run_breaking(method)
    assert method.calls == 3


def test_with_fp16_a_gradient_that_is_not_finite_costs_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    unscaled = run(Recording())[0].gradient_norm
    monkeypatch.setattr(loop, "effective_precision", lambda precision, device: "fp16")
    done = run_breaking(Breaking("gradient"))
    assert len(done) == 8
    weights = [weight for _, weight in done]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert [math.isfinite(step.gradient_norm) for step, _ in done] == [True, True, False, *[True] * 5]
    assert run(Recording())[0].gradient_norm == pytest.approx(unscaled, rel=1e-3)


def test_with_fp16_a_loss_that_is_not_finite_stops_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "effective_precision", lambda precision, device: "fp16")
    with pytest.raises(TrainingError, match="expected a finite loss, got nan"):
        run_breaking(Breaking("loss"))


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        run(build("simsiam"), batch_size=71)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 3}, "expected a divisor of batch_size 16, got 3"),
        ({"accumulate": 0}, "expected a divisor of batch_size 16, got 0"),
        ({"precision": "bfloat16"}, "expected one of float32, bf16, fp16; got 'bfloat16'"),
    ],
)
def test_a_recipe_that_can_not_be_followed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**changes)
