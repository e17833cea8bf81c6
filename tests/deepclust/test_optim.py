"""The schedule by hand, and who follows it."""

import math

import pytest
import torch

from deepclust import optim


def test_the_schedule_warms_up_linearly_and_falls_by_a_cosine() -> None:
    schedule = optim.Schedule(rate=0.4, final_rate=0.1, warmup_steps=4, total_steps=12)
    assert [schedule.at(step) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert schedule.at(4) == pytest.approx(0.4)
    assert schedule.at(8) == pytest.approx(0.04 + 0.36 * (1 + math.cos(math.pi / 2)) / 2)
    assert schedule.at(12) == pytest.approx(0.04)


def test_a_constant_group_keeps_the_rate_and_the_others_follow() -> None:
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimiser = optim.sgd(
        [{"params": [first]}, {"params": [second], "constant_rate": True}], momentum=0.9, weight_decay=0.0
    )
    schedule = optim.Schedule(rate=1.0, final_rate=0.0, warmup_steps=0, total_steps=10)
    assert optim.set_rate(optimiser, schedule, 5) == pytest.approx(0.5)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.5, 1.0])
