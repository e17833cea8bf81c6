"""k-means of several processes, each with rows of its own, against one process with all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepclust import distributed, seeding
from deepclust.clustering import kmeans
from deepclust.errors import ConfigError, DataError
from tests import processes

BOTH = pytest.mark.parametrize("initialisation", ["k-means++", "points"])


def points(count: int, *, unit: bool = False) -> Tensor:
    """Groups that overlap: far from an even spread, with many points between two centroids."""
    generator = seeding.generator("points", count)
    rows = torch.randn(count, 6, generator=generator) + 2 * torch.randn(12, 6, generator=generator).repeat(
        count // 12 + 1, 1
    ).narrow(0, 0, count)
    return torch.nn.functional.normalize(rows, dim=1) if unit else rows


def fit(rows: Tensor, k: int, options: dict[str, Any], sizes: list[int] | None = None) -> kmeans.Clusters:
    """The fit on this process's rows: its share, or as many as `sizes` says."""
    mine = rows.split(sizes)[distributed.rank()] if sizes else rows[distributed.share(len(rows))]
    return kmeans.fit(mine, k, **({"seed": 0, "iterations": 20} | options))


def joined(parts: list[kmeans.Clusters]) -> kmeans.Clusters:
    """The processes' results as one, after checking that they agree."""
    first = parts[0]
    for part in parts[1:]:
        assert torch.equal(part.centroids, first.centroids)
        assert (part.inertia, part.iterations) == (first.inertia, first.iterations)
    assignments, distances = (torch.cat([getattr(part, of) for part in parts]) for of in ("assignments", "distances"))
    return kmeans.Clusters(first.centroids, assignments, distances, first.inertia, first.iterations)


def assert_same(many: kmeans.Clusters, one: kmeans.Clusters, rows: Tensor) -> None:
    """Equal but for rounding: another cluster only where the two nearest are equally far."""
    assert many.inertia == pytest.approx(one.inertia, rel=1e-6, abs=1e-9)
    if one.inertia > 0:  # else what remains of it is rounding, and so is when to stop
        assert many.iterations == one.iterations
    for found, expected in ((many.centroids, one.centroids), (many.distances, one.distances)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    distances = (rows.double()[:, None] - one.centroids.double()).square().sum(2).sqrt()
    chosen = distances.gather(1, torch.stack([many.assignments, one.assignments], 1))
    torch.testing.assert_close(chosen[:, 0], chosen[:, 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("world", "k", "options"),
    [
        (4, 13, {"initialisation": "k-means++"}),
        (2, 13, {"initialisation": "k-means++", "spherical": True}),
        (4, 13, {"initialisation": "points", "restarts": 3}),
        (2, 13, {"initial": points(601)[5:18].clone(), "engine": "torch"}),
        (2, 260, {"initialisation": "points", "iterations": 5}),  # another way to search than for few clusters
    ],
)
def test_many_processes_find_what_one_finds(world: int, k: int, options: dict[str, Any], seed: int) -> None:
    rows = points(601, unit="spherical" in options)
    one = fit(rows, k, options | {"seed": seed})
    assert one.iterations > 3
    assert_same(joined(processes.pool(world).run(fit, rows, k, options | {"seed": seed})), one, rows)
    if "initial" in options:
        assert torch.equal(options["initial"], rows[5:18])


@BOTH
@pytest.mark.parametrize("sizes", [[601, 0], [7, 0, 590, 4]])
def test_any_division_of_the_rows_gives_the_same(sizes: list[int], initialisation: str) -> None:
    rows, options = points(601), {"seed": 1, "initialisation": initialisation}
    many = joined(processes.pool(len(sizes)).run(fit, rows, 13, options, sizes))
    assert_same(many, fit(rows, 13, options), rows)


@BOTH
def test_fewer_points_than_processes_are_clustered_too(initialisation: str) -> None:
    rows, options = points(3), {"initialisation": initialisation}
    for k in (1, 3):
        assert_same(joined(processes.pool(4).run(fit, rows, k, options)), fit(rows, k, options), rows)


def test_more_clusters_than_distinct_points_end_alike() -> None:
    # Exact copies of five points, whose squares and products are whole numbers.
    rows = torch.tensor([[0.0, 0.0], [3.0, 1.0], [8.0, 0.0], [0.0, 9.0], [-7.0, 5.0]]).repeat(9, 1)[:42]
    one, many = fit(rows, 12, {}), joined(processes.pool(2).run(fit, rows, 12, {}))
    assert (one.inertia, one.iterations) == (0, many.iterations)
    assert torch.equal(many.centroids, one.centroids)


def _refilled(rows: Tensor) -> list[float]:
    mine = rows[distributed.share(len(rows))]
    centroids = torch.tensor([[0.0], [-50.0], [-50.0], [-50.0]])
    kmeans._refill(mine, torch.zeros(len(mine), dtype=torch.long), centroids, torch.tensor([len(rows), 0, 0, 0]))
    return centroids.flatten().tolist()


def test_empty_clusters_move_to_the_worst_served_points_of_all_and_of_equals_to_the_first() -> None:
    # One process has three of the four farthest, at two distances that others have as well.
    rows = torch.tensor([[0.0], [5.0], [1.0], [2.0], [-5.0], [5.0], [9.0], [0.0]])
    assert _refilled(rows) == [0.0, 9.0, 5.0, -5.0]
    assert processes.pool(4).run(_refilled, rows) == [[0.0, 9.0, 5.0, -5.0]] * 4


def _concentration(distances: Tensor, assignments: Tensor) -> Tensor:
    mine = distributed.share(len(distances))
    return kmeans.concentration(distances[mine], assignments[mine], k=40, temperature=0.2)


def test_concentration_counts_the_members_on_all_processes() -> None:
    generator = seeding.generator("concentration")
    distances = torch.rand(91, generator=generator)
    assignments = (40 * torch.rand(91, generator=generator).square()).long()
    many = processes.pool(4).run(_concentration, distances, assignments)
    for found in many:
        assert torch.equal(found, many[0])
        torch.testing.assert_close(found, _concentration(distances, assignments), rtol=1e-6, atol=0)


def _refused(rows: Tensor, k: int) -> str:
    with pytest.raises((ConfigError, DataError)) as error:
        fit(rows, k, {})
    return str(error.value)


def test_errors_are_those_of_one_process_and_the_same_on_all() -> None:
    rows, broken = points(5), points(5)
    broken[4, 2] = torch.inf
    for wrong, message in [((rows, 6), "≤ 5, the number of points; got k = 6"), ((broken, 2), "finite points")]:
        assert message in _refused(*wrong)
        assert processes.pool(4).run(_refused, *wrong) == [_refused(*wrong)] * 4
