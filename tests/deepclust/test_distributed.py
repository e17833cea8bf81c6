"""Several processes against one, each with data of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from deepclust import distributed, seeding
from deepclust.errors import ConfigError, PeerError
from tests import processes
from tests.pipelines import eventually


def _rows(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=seeding.generator("rows"))


def _reduce(counts: list[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
    mine = _rows(4, 3)[distributed.rank()]
    gathered = [distributed.gather(_rows(count, 3)[distributed.share(count)], count) for count in counts]
    return gathered, {
        "sum": distributed.all_sum(mine.double()),
        "max": distributed.all_max(mine),
        "mean": distributed.all_mean(mine.double()),
        "first": distributed.broadcast(mine),
    }


def test_reductions_are_those_of_the_stacked_rows_and_gathered_shares_the_whole() -> None:
    rows, counts = _rows(4, 3), [3, 13]
    for gathered, found in processes.pool(4).run(_reduce, counts):
        for count, whole in zip(counts, gathered, strict=True):
            assert torch.equal(whole, _rows(count, 3))
        torch.testing.assert_close(found["sum"], rows.double().sum(0))
        torch.testing.assert_close(found["mean"], rows.double().mean(0))
        assert torch.equal(found["max"], rows.amax(0))
        assert torch.equal(found["first"], rows[0])


def _part() -> list[int]:
    with pytest.raises(ConfigError, match="2 processes × accumulate 2, got 10"):
        distributed.part(torch.arange(10), 2)
    return distributed.part(torch.arange(12), 3).tolist()


def test_a_part_of_all_processes_together_is_that_of_one_and_what_can_not_be_divided_is_refused() -> None:
    assert processes.pool(2).run(_part) == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def _one_fails() -> str:
    try:
        with distributed.together():
            if distributed.rank() == 1:
                raise ValueError("mine")
    except (ValueError, PeerError) as error:
        return type(error).__name__
    return "none"


def test_what_fails_on_one_process_fails_on_all() -> None:
    assert processes.pool(2).run(_one_fails) == ["PeerError", "ValueError"]


def _by_main(beats: Path) -> tuple[list[float], list[int]]:
    """What the main process sees while the other waits; and afterwards the ranks of all."""
    own: list[float] = []
    meet = distributed._meet

    def counted(*, at_work: bool) -> bool:
        if at_work:
            beats.write_text(beats.read_text() + "." if beats.exists() else ".")
        return meet(at_work=at_work)

    distributed._meet = counted
    try:
        with distributed.by_main(every=0.05) as main:
            if main:
                assert eventually(lambda: beats.exists() and len(beats.read_text()) > 2, 20)
                rows = torch.arange(3)
                assert distributed.share(3) == slice(0, 3)
                own = [distributed.processes(), distributed.rank(), float(distributed.all_sum(rows).sum())]
    finally:
        distributed._meet = meet
    return own, distributed.gather(torch.tensor([distributed.rank()])).tolist()


def test_the_others_wait_while_the_main_process_works_as_if_it_were_alone(tmp_path: Path) -> None:
    assert processes.pool(2).run(_by_main, tmp_path / "beats") == [([1, 0, 3.0], [0, 1]), ([], [0, 1])]


def _main_fails() -> str:
    try:
        with distributed.by_main(every=0.01) as main:
            if main:
                raise ValueError("mine")
    except (ValueError, PeerError) as error:
        return type(error).__name__
    return "none"


def test_what_fails_on_the_main_process_alone_fails_on_all() -> None:
    assert processes.pool(2).run(_main_fails) == ["ValueError", "PeerError"]


def _texts(lengths: list[int]) -> list[bytes]:
    return distributed.gather_bytes(random.Random(distributed.rank()).randbytes(lengths[distributed.rank()]))


@pytest.mark.parametrize("lengths", [[5, 0, 1000, 1], [0, 0, 0, 0]])
def test_bytes_of_any_length_are_gathered_in_order(lengths: list[int]) -> None:
    wanted = [random.Random(rank).randbytes(length) for rank, length in enumerate(lengths)]
    assert processes.pool(4).run(_texts, lengths) == [wanted] * 4


def _at_work(done: Path, failing: int | None) -> tuple[str, int, bool]:
    """Process 1 is at work for five heartbeats, in each of which all meet; the others have nothing to do."""
    beats, error = 0, "none"
    try:
        with distributed.together(every=0) as heartbeat:
            if distributed.rank() == failing:
                raise ValueError("mine")
            if distributed.rank() == 1:
                for beats in range(1, 6):  # noqa: B007
                    heartbeat()
                done.touch()
    except (ValueError, PeerError) as raised:
        error = type(raised).__name__
    was_done = done.exists()
    assert distributed.all_sum(torch.tensor(1)).item() == 3, "the processes are in step"
    return error, beats, was_done


def test_those_that_are_done_wait_for_one_at_work_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    found = processes.pool(3).run(_at_work, tmp_path / "done", None)
    assert found == [("none", 0, True), ("none", 5, True), ("none", 0, True)]


def test_the_next_heartbeat_tells_one_at_work_that_another_has_failed(tmp_path: Path) -> None:
    found = processes.pool(3).run(_at_work, tmp_path / "done", 0)
    assert found == [("ValueError", 0, False), ("PeerError", 1, False), ("PeerError", 0, False)]


def _net(kind: str) -> nn.Module:
    with seeding.seeded("net"):
        if kind == "1d":
            return nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))
        norm = BatchNormAct2d if kind == "timm" else nn.BatchNorm2d
        return nn.Sequential(nn.Conv2d(2, 5, 3), norm(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))


def _train(kind: str, sizes: list[int]) -> dict[str, Any]:
    """Three steps on this process's rows, of which each has as many as `sizes` says; or all on one process."""
    rows = _rows(sum(sizes), *((2, 6, 6) if kind != "1d" else (6,)))
    mine = rows if distributed.processes() == 1 else rows.split(sizes)[distributed.rank()]
    net = _net(kind)
    distributed.synchronise(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimiser.zero_grad()
        # A sum over all rows: each process's part, times their number, since the gradients are averaged.
        (net(mine).square().sum() * distributed.processes()).backward()
        distributed.average_gradients(net.parameters())
        optimiser.step()
    return {name: value.detach() for name, value in net.state_dict().items()}


@pytest.mark.parametrize(("kind", "sizes"), [("1d", [7, 1]), ("2d", [8, 0]), ("timm", [4, 4])])
def test_synchronised_batch_norm_trains_like_one_process(kind: str, sizes: list[int]) -> None:
    want = _train(kind, sizes)
    for got in processes.pool(2).run(_train, kind, sizes):
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
