"""What the methods share."""

import pytest
import torch
from torch import nn

from deepclust.methods.parts import base
from tests.deepclust.methods.toys import normal, unit


def test_each_resolution_is_one_forward_pass_and_the_views_keep_their_order() -> None:
    sizes: list[tuple[int, ...]] = []

    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(x.shape))
            return x.mean((2, 3))

    views = [torch.full((2, 1, size, size), float(n)) for n, size in enumerate([8, 8, 4, 4, 4, 2])]
    out = base.by_resolution(Mean(), views)
    assert sizes == [(4, 1, 8, 8), (6, 1, 4, 4), (2, 1, 2, 2)]
    assert base.by_view(out, 6).flatten(1).tolist() == [[n, n] for n in range(6)]


def test_the_spread_is_its_formula_one_for_even_directions_and_zero_for_one() -> None:
    rows = normal(30, 5, seed=0)
    assert float(base.spread(rows)) == pytest.approx(rows.double().numpy().std(0).mean() * 5**0.5, rel=1e-6)
    assert float(base.spread(unit(4000, 64, seed=0))) == pytest.approx(1, rel=0.03)
    assert float(base.spread(unit(1, 64, seed=0).expand(50, -1))) == pytest.approx(0, abs=1e-6)


def test_used_prototypes_are_counted_against_what_the_batch_could_use() -> None:
    assert float(base.share_used(torch.tensor([0, 0, 3]), 10)) == pytest.approx(2 / 3)
    assert float(base.share_used(torch.tensor([0, 1, 1, 0, 1]), 4)) == 0.5
