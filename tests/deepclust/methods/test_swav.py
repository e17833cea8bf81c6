"""SwAV against the formulas of the paper in float64, by loops."""

import numpy as np
import pytest
import torch
from torch import nn

from deepclust import heads, optim
from deepclust.methods import base
from deepclust.methods.swav import SwAV, swapped_loss
from tests.deepclust.test_sinkhorn import plain_sinkhorn


def toy(**changes: object) -> SwAV:
    torch.manual_seed(0)
    options = {
        "hidden_dim": 0,
        "dim": 6,
        "prototypes": 10,
        "temperature": 0.1,
        "epsilon": 0.05,
        "sinkhorn_iterations": 3,
        "assign_crops": [0, 1],
        "freeze_prototypes_steps": 0,
    }
    return SwAV(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), 8, **(options | changes))  # type: ignore[arg-type]


def crops(count: int = 4, batch: int = 12) -> list[torch.Tensor]:
    return list(torch.randn(count, batch, 1, 4, 4, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("assign", [(0, 1), (0,), (2, 0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_the_papers_in_float64(assign: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-1, 1, (4, 12, 10))
    codes = {crop: plain_sinkhorn(scores[crop], 0.05, 3) for crop in assign}
    total = 0.0
    for i in assign:
        for v in set(range(4)) - {i}:
            for n in range(12):
                s = scores[v, n] / 0.1
                log_p = s - s.max() - np.log(np.exp(s - s.max()).sum())
                total += -(codes[i][n] * log_p).sum() / 12 / 3 / len(assign)
    found = swapped_loss(
        list(torch.from_numpy(scores).float()),
        {crop: torch.from_numpy(code).float() for crop, code in codes.items()},
        temperature=0.1,
    )
    assert float(found) == pytest.approx(total, rel=1e-5)


def test_the_whole_method_equals_its_parts_in_float64() -> None:
    method = toy()
    views = crops()
    loss, logged = method.loss(views, torch.arange(12), torch.Generator())
    exact = toy().double()
    weight = exact.prototypes.weight / exact.prototypes.weight.norm(dim=1, keepdim=True)
    scores = []
    for view in views:
        z = exact.head(exact.backbone(view.double()))
        scores.append((z / z.norm(dim=1, keepdim=True)) @ weight.T)
    codes = {i: torch.from_numpy(plain_sinkhorn(scores[i].detach().numpy(), 0.05, 3)) for i in (0, 1)}
    assert float(loss) == pytest.approx(float(swapped_loss(scores, codes, temperature=0.1)), rel=1e-5)
    used = set(codes[0].argmax(1).tolist()) | set(codes[1].argmax(1).tolist())
    assert float(logged["prototypes_used"]) == pytest.approx(len(used) / 10)


def test_no_gradient_flows_through_the_codes() -> None:
    method = toy()
    scores = [torch.randn(5, 10, requires_grad=True) for _ in range(2)]
    loss = swapped_loss(scores, {0: torch.softmax(scores[0].detach(), 1)}, temperature=0.1)
    loss.backward()
    assert scores[0].grad is None or not scores[0].grad.any()
    assert scores[1].grad is not None
    assert method.prototypes.weight.grad is None


def test_frozen_prototypes_stay_in_spite_of_weight_decay_and_momentum() -> None:
    method = toy(freeze_prototypes_steps=2)
    optimiser = optim.sgd(method.parameter_groups(), momentum=0.9, weight_decay=0.1)
    schedule = optim.Schedule(rate=1.0, final_rate=1.0, warmup_steps=0, total_steps=10)
    method.prototypes.normalise()
    start = method.prototypes.weight.detach().clone()
    moved = []
    for step in range(4):
        optim.set_rate(optimiser, schedule, step)
        loss, _ = method.loss(crops(), torch.arange(12), torch.Generator())
        optimiser.zero_grad()
        loss.backward()
        method.after_backward(step)
        optimiser.step()
        moved.append(not torch.allclose(method.prototypes.weight, start, atol=1e-6))
    assert moved == [False, False, True, True]


def test_prototypes_have_unit_length_before_they_score() -> None:
    prototypes = heads.Prototypes(5, 3)
    with torch.no_grad():
        prototypes.weight.mul_(7)
    prototypes.normalise()
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(5))


def test_each_resolution_is_one_forward_pass_and_the_views_keep_their_order() -> None:
    sizes: list[tuple[int, ...]] = []

    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(x.shape))
            return x.mean((2, 3))

    views = [torch.full((2, 1, size, size), float(n)) for n, size in enumerate([8, 8, 4, 4, 4])]
    out = base.by_resolution(Mean(), views)
    assert sizes == [(4, 1, 8, 8), (6, 1, 4, 4)]
    assert out.flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
