"""k-means of several processes, each with rows of its own, against one process with all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepclust import distributed, seeding
from deepclust.clustering import kmeans
from deepclust.errors import ConfigError, DataError
from tests import processes

WORLDS = (2, 4)


def points(count: int, *, unit: bool = False) -> Tensor:
    """Groups that overlap: far from an even spread, with many points between two centroids."""
    generator = seeding.generator("points", count)
    rows = torch.randn(count, 6, generator=generator) + 2 * torch.randn(12, 6, generator=generator).repeat(
        count // 12 + 1, 1
    ).narrow(0, 0, count)
    return torch.nn.functional.normalize(rows, dim=1) if unit else rows


def few_distinct(count: int) -> Tensor:
    """Exact copies of five points, whose squares and products are whole numbers."""
    return torch.tensor([[0.0, 0.0], [3.0, 1.0], [8.0, 0.0], [0.0, 9.0], [-7.0, 5.0]]).repeat(count // 5 + 1, 1)[:count]


def fit(rows: Tensor, k: int, options: dict[str, Any], sizes: list[int] | None = None) -> kmeans.Clusters:
    """The fit on this process's rows: its share, or as many as `sizes` says."""
    mine = distributed.share(len(rows))
    if sizes is not None:
        start = sum(sizes[: distributed.rank()])
        mine = slice(start, start + sizes[distributed.rank()])
    return kmeans.fit(rows[mine], k, **options)


def joined(parts: list[kmeans.Clusters]) -> kmeans.Clusters:
    """The processes' results as one, after checking that they agree."""
    first = parts[0]
    for part in parts[1:]:
        assert torch.equal(part.centroids, first.centroids)
        assert (part.inertia, part.iterations) == (first.inertia, first.iterations)
    return kmeans.Clusters(
        first.centroids,
        torch.cat([part.assignments for part in parts]),
        torch.cat([part.distances for part in parts]),
        first.inertia,
        first.iterations,
    )


def assert_same(many: kmeans.Clusters, one: kmeans.Clusters, rows: Tensor) -> None:
    """Equal but for rounding: another cluster only where the two nearest are equally far."""
    assert many.inertia == pytest.approx(one.inertia, rel=1e-6, abs=1e-9)
    if one.inertia > 0:  # else what remains of it is rounding, and so is when to stop
        assert many.iterations == one.iterations
    torch.testing.assert_close(many.centroids, one.centroids, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(many.distances, one.distances, rtol=1e-5, atol=1e-5)
    distances = (rows.double()[:, None] - one.centroids.double()).square().sum(2).sqrt()
    chosen = distances.gather(1, torch.stack([many.assignments, one.assignments], 1))
    torch.testing.assert_close(chosen[:, 0], chosen[:, 1], rtol=0, atol=1e-6)


OPTIONS = {
    "k-means++": {"initialisation": "k-means++"},
    "points": {"initialisation": "points"},
    "spherical": {"initialisation": "points", "spherical": True},
    "spherical k-means++": {"initialisation": "k-means++", "spherical": True},
    "restarts": {"initialisation": "points", "restarts": 4},
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_many_processes_find_what_one_finds(world: int, name: str, seed: int) -> None:
    rows = points(601, unit="spherical" in name)
    options = {"seed": seed, "iterations": 30} | OPTIONS[name]
    one = fit(rows, 13, options)
    assert one.iterations > 3
    assert_same(joined(processes.pool(world).run(fit, rows, 13, options)), one, rows)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("initialisation", ["k-means++", "points"])
def test_the_search_for_many_clusters_finds_the_same_too(world: int, initialisation: str) -> None:
    rows = points(601)
    options = {"seed": 0, "iterations": 5, "initialisation": initialisation}
    many = joined(processes.pool(world).run(fit, rows, 260, options))
    assert_same(many, fit(rows, 260, options), rows)


@pytest.mark.parametrize("k", [13, 260])
def test_two_processes_and_one_with_either_engine_come_to_the_same_inertia(k: int) -> None:
    rows, found = points(601), []
    for engine in ("faiss", "torch"):
        options = {"seed": 0, "iterations": 10, "engine": engine}
        one, many = fit(rows, k, options), joined(processes.pool(2).run(fit, rows, k, options))
        assert_same(many, one, rows)
        found += [one.inertia, many.inertia]
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("initialisation", ["k-means++", "points"])
@pytest.mark.parametrize("sizes", [[400, 201], [1, 600], [0, 601], [601, 0], [7, 0, 590, 4]])
def test_any_division_of_the_rows_gives_the_same(sizes: list[int], initialisation: str) -> None:
    rows = points(601)
    options = {"seed": 1, "iterations": 30, "initialisation": initialisation}
    many = joined(processes.pool(len(sizes)).run(fit, rows, 13, options, sizes))
    assert_same(many, fit(rows, 13, options), rows)


@pytest.mark.parametrize("initialisation", ["k-means++", "points"])
def test_fewer_points_than_processes_are_clustered_too(initialisation: str) -> None:
    rows = points(3)
    for k in (1, 2, 3):
        options = {"seed": 0, "iterations": 10, "initialisation": initialisation}
        assert_same(joined(processes.pool(4).run(fit, rows, k, options)), fit(rows, k, options), rows)


@pytest.mark.parametrize("world", WORLDS)
def test_a_given_start_ends_where_one_process_ends_and_stays_as_it_is(world: int) -> None:
    rows = points(601)
    options = {"seed": 0, "iterations": 30, "initial": rows[5:18].clone()}
    one = fit(rows, 13, options)
    assert torch.equal(options["initial"], rows[5:18])
    assert_same(joined(processes.pool(world).run(fit, rows, 13, options)), one, rows)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("initialisation", ["k-means++", "points"])
def test_more_clusters_than_distinct_points_end_alike(world: int, initialisation: str) -> None:
    rows = few_distinct(42)
    options = {"seed": 0, "iterations": 20, "initialisation": initialisation}
    one = fit(rows, 12, options)
    assert one.inertia == 0
    many = joined(processes.pool(world).run(fit, rows, 12, options))
    assert torch.equal(many.centroids, one.centroids)
    assert many.iterations == one.iterations
    assert torch.equal(many.distances, one.distances)


def _refilled(rows: Tensor, centroids: Tensor) -> Tensor:
    mine = rows[distributed.share(len(rows))]
    centroids = centroids.clone()
    assignments = torch.zeros(len(mine), dtype=torch.long)
    kmeans._refill(mine, assignments, centroids, torch.tensor([len(rows), 0, 0, 0]))
    return centroids


def test_empty_clusters_move_to_the_worst_served_points_of_all_and_of_equals_to_the_first() -> None:
    # One process has three of the four farthest, at two distances that others have as well.
    rows = torch.tensor([[0.0], [5.0], [1.0], [2.0], [-5.0], [5.0], [9.0], [0.0]])
    start = torch.tensor([[0.0], [-50.0], [-50.0], [-50.0]])
    for world in WORLDS:
        for centroids in processes.pool(world).run(_refilled, rows, start):
            assert centroids.flatten().tolist() == [0.0, 9.0, 5.0, -5.0]


def test_one_process_may_have_fewer_points_than_there_are_empty_clusters() -> None:
    rows = torch.tensor([[0.0], [4.0], [3.0], [6.0], [1.0]])
    start = torch.tensor([[0.0], [-50.0], [-50.0], [-50.0]])
    for centroids in processes.pool(4).run(_refilled, rows, start):
        assert centroids.flatten().tolist() == [0.0, 6.0, 4.0, 3.0]


def _fetched(rows: Tensor, indices: Tensor) -> Tensor:
    mine = rows[distributed.share(len(rows))]
    start, count = kmeans._place(mine)
    assert count == len(rows)
    return kmeans._fetch(mine, start, indices)


@pytest.mark.parametrize("world", WORLDS)
def test_rows_come_from_whoever_has_them(world: int) -> None:
    rows, indices = points(13), torch.tensor([12, 0, 3, 3, 7])
    for fetched in processes.pool(world).run(_fetched, rows, indices):
        assert torch.equal(fetched, rows[indices])


def _memory_mapped(path: str, k: int) -> kmeans.Clusters:
    rows = torch.from_numpy(np.load(path, mmap_mode="c"))
    return fit(rows, k, {"seed": 0, "iterations": 10})


def test_points_may_be_a_memory_map_which_stays_as_it_is(tmp_path: Path) -> None:
    rows, path = points(601), tmp_path / "points.npy"
    np.save(path, rows.numpy())
    one = fit(rows, 13, {"seed": 0, "iterations": 10})
    assert_same(joined(processes.pool(2).run(_memory_mapped, str(path), 13)), one, rows)
    assert torch.equal(torch.from_numpy(np.load(path)), rows)


def _concentration(distances: Tensor, assignments: Tensor) -> Tensor:
    mine = distributed.share(len(distances))
    return kmeans.concentration(distances[mine], assignments[mine], k=40, temperature=0.2)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", [91, 2])
def test_concentration_counts_the_members_on_all_processes(world: int, count: int) -> None:
    generator = seeding.generator("concentration")
    distances = torch.rand(count, generator=generator)
    assignments = (40 * torch.rand(count, generator=generator).square()).long()
    one = _concentration(distances, assignments)
    many = processes.pool(world).run(_concentration, distances, assignments)
    for found in many:
        assert torch.equal(found, many[0])
        torch.testing.assert_close(found, one, rtol=1e-6, atol=0)


def _refused(rows: Tensor, k: int) -> tuple[str, str]:
    try:
        fit(rows, k, {"seed": 0, "iterations": 5})
    except (ConfigError, DataError) as error:
        return type(error).__name__, str(error)
    return "none", ""


def test_errors_are_those_of_one_process_and_the_same_on_all() -> None:
    rows = points(5)
    broken = rows.clone()
    broken[4, 2] = torch.inf
    for wrong in [(rows, 6), (rows, 0), (broken, 2)]:
        one = _refused(*wrong)
        assert one[0] != "none"
        assert processes.pool(4).run(_refused, *wrong) == [one] * 4
