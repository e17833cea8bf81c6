"""Pictures of a formula, drawn at known scales and places, are laid back onto each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deepclust.inspection import registration

PAIR = torch.tensor([[0, 1]])


def drawn(scale: float, shift: tuple[float, float], mirror: bool = False) -> Tensor:
    """Waves of many directions, seen by a window whose middle is at `shift` and whose half side is `scale`."""
    x, y = registration.grid(registration.SIDE)
    x, y = scale * (-x if mirror else x) + shift[0], scale * y + shift[1]
    random = np.random.default_rng(0)
    total = torch.full_like(x, 128.0)
    for across, down, phase in zip(*random.uniform(-9, 9, (2, 12)), random.uniform(0, 6, 12), strict=True):
        total += 15 * torch.sin(across * x + down * y + phase)
    return total


def placed(first: Tensor, second: Tensor) -> registration.Placement:
    both = torch.stack([first, second])
    return registration.refined(both, PAIR, registration.coarse(both, PAIR))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(
    ("scale", "shift"),
    [(1.0, (0.0, 0.0)), (0.9, (0.1, 0.0)), (0.9, (-0.08, 0.1)), (1 / 0.9, (0.05, -0.1)), (1, (0.2, 0))],
)
def test_scale_shift_and_mirror_are_those_drawn(scale: float, shift: tuple[float, float], mirror: bool) -> None:
    found = placed(drawn(1, (0, 0)), drawn(scale, shift, mirror))
    pixel = 2 / registration.SIDE
    assert found.mirrored.item() == mirror
    # A pixel of the second lies at scale * x + shift of the first, so that the first's lies at (x - shift) / scale.
    assert found.scale.item() == pytest.approx(1 / scale, abs=pixel / 8)
    assert found.shift[0].tolist() == pytest.approx([-part / scale for part in shift], abs=pixel / 8)
    assert found.correlation.item() > 0.95


def test_the_correlation_is_that_of_the_details_of_the_pixels_both_show() -> None:
    random = np.random.default_rng(0)
    first, second = drawn(1, (0, 0)), drawn(1, (0, 0)) + torch.from_numpy(random.normal(0, 8, (32, 32))).float()
    found = placed(first, second)
    assert (found.scale.item(), *found.shift[0].tolist()) == pytest.approx((1, 0, 0), abs=0.01)
    still = registration.Placement(found.mirrored, torch.ones(1), torch.zeros(1, 2), torch.zeros(1))
    both = torch.stack([first, second])
    details = registration.details(both).double().numpy()
    padded = np.pad(first.double().numpy(), 2, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).mean((2, 3))
    np.testing.assert_allclose(details[0], first.double().numpy() - around, atol=1e-3)
    moved, over, seen = registration.overlaid(both, PAIR, still)
    assert seen.all()
    torch.testing.assert_close(moved[0], first)
    torch.testing.assert_close(over[0], second, atol=1e-3, rtol=1e-5)
    assert found.correlation.item() == pytest.approx(
        np.corrcoef(details[0].ravel(), details[1].ravel())[0, 1], abs=0.02
    )


def test_pictures_without_structure_agree_with_nothing() -> None:
    found = placed(torch.full((32, 32), 90.0), torch.full((32, 32), 91.0))
    assert abs(found.correlation.item()) < 0.01
    assert all(part.isfinite().all() for part in found)


def test_no_pairs_are_no_trouble() -> None:
    none = torch.empty(0, 2, dtype=torch.int64)
    start = registration.coarse(torch.zeros(3, 32, 32), none)
    assert len(registration.refined(torch.zeros(3, 32, 32), none, start).scale) == 0
