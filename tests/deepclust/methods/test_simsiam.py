"""SimSiam against the formula in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from deepclust.methods.simsiam import SimSiam, symmetric_loss


def toy(constant: bool = True) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 8)),
        8,
        hidden_dim=12,
        dim=10,
        predictor_dim=4,
        constant_predictor_rate=constant,
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_is_the_papers_in_float64(seed: int) -> None:
    p1, p2, z1, z2 = np.random.default_rng(seed).normal(size=(4, 9, 5))
    cosines = [
        np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(p, z, strict=True)])
        for p, z in ((p1, z2), (p2, z1))
    ]
    found = symmetric_loss(*(torch.from_numpy(x).float() for x in (p1, p2, z1, z2)))
    assert float(found) == pytest.approx(-sum(cosines) / 2, rel=1e-5)


def test_the_targets_get_no_gradient_and_the_predictions_do() -> None:
    p1, p2, z1, z2 = (torch.randn(4, 5, requires_grad=True) for _ in range(4))
    symmetric_loss(p1, p2, z1, z2).backward()
    assert z1.grad is None
    assert z2.grad is None
    assert p1.grad is not None
    assert p2.grad is not None


def test_swapping_the_views_changes_nothing() -> None:
    left, right = torch.randn(2, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    first, _ = toy().loss([left, right], torch.arange(16), torch.Generator())
    second, _ = toy().loss([right, left], torch.arange(16), torch.Generator())
    assert float(first) == pytest.approx(float(second), rel=1e-6)


def test_the_logged_spread_tells_a_healthy_batch_from_a_collapsed_one() -> None:
    views = list(torch.randn(2, 512, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    _, healthy = toy().loss(views, torch.arange(512), torch.Generator())
    assert float(healthy["embedding_std"]) == pytest.approx(10**-0.5, rel=0.1)
    same = [view[:1].expand(512, -1, -1, -1) for view in views]
    _, collapsed = toy().loss(same, torch.arange(512), torch.Generator())
    assert float(collapsed["embedding_std"]) < 1e-3


def test_only_the_predictor_may_keep_its_rate() -> None:
    first, second = toy(constant=True).parameter_groups()
    assert not first.get("constant_rate", False)
    assert second["constant_rate"]
    assert not toy(constant=False).parameter_groups()[1]["constant_rate"]
    assert len(first["params"]) + len(second["params"]) == len(list(toy().parameters()))
