"""Lloyd's algorithm against scikit-learn and brute force in float64; φ by hand and by a loop."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from deepclust.clustering import kmeans
from deepclust.errors import ConfigError, DataError
from deepclust.methods.deepcluster_v2 import DeepClusterV2
from deepclust.methods.pcl import PCL
from tests.deepclust.methods.toys import backbone, embedder, normal

ENGINES: tuple[kmeans.Engine, ...] = ("faiss", "torch")
needs_faiss = pytest.mark.skipif(kmeans.faiss is None, reason="faiss is not installed")


def points(count: int = 600, dim: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_a_fixed_start_ends_where_scikit_learn_ends() -> None:
    data = points()
    start = kmeans._INITIALISATIONS["points"](
        data, 8, torch.Generator().manual_seed(kmeans.seeding.derive(3, "k-means", 8))
    )
    expected = KMeans(8, init=start.numpy(), n_init=1, max_iter=500, tol=0).fit(data.numpy())
    found = kmeans.fit(data, 8, seed=3, iterations=500, initialisation="points", tolerance=0.0)
    assert found.inertia == pytest.approx(expected.inertia_, rel=1e-5)
    assert (found.assignments.numpy() == expected.labels_).all()
    np.testing.assert_allclose(found.centroids.numpy(), expected.cluster_centers_, atol=1e-5)


@pytest.mark.parametrize("dim", [12, 128])
@pytest.mark.parametrize("k", [3, 10, 20, 21, 300])
def test_both_engines_find_the_nearest_centroid_of_brute_force(k: int, dim: int) -> None:
    # Enough points for faiss's matrix product where the clusters are many.
    data, centroids = points(140_000 // dim, dim), points(k, dim, seed=1)
    squared = torch.stack([(data.double() - centroid).square().sum(1) for centroid in centroids.double()], 1)
    nearest, second = squared.sort(1).values[:, :2].unbind(1)
    # Above the rounding of the expanded square in float32, and still nearly all points.
    clear = second - nearest > 1e-6 * (data.double().square().sum(1) + centroids.double().square().sum(1).max())
    assert clear.float().mean() > 0.99
    for engine in ENGINES:
        assignments, found = kmeans.assign(data, centroids, engine=engine)
        assert torch.equal(assignments[clear], squared.argmin(1)[clear])
        torch.testing.assert_close(found.double(), nearest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dim", [1, 5, 128])
@pytest.mark.parametrize("k", [2, 10, 33, 260])
def test_of_equal_centroids_the_first_is_named(k: int, dim: int, engine: kmeans.Engine) -> None:
    data = points(140_000 // dim, dim)
    copies = torch.randint(max(1, k // 2), (k,), generator=torch.Generator().manual_seed(k))
    copies[-1] = copies[0]
    centroids = points(k, dim, seed=1)[copies]
    firsts = [int((copies == copy).nonzero()[0]) for copy in copies.unique()]
    named = kmeans.assign(data, centroids, engine=engine)[0].unique()
    assert set(named.tolist()) <= set(firsts)


@pytest.mark.parametrize("k", [10, 260])
def test_both_engines_cluster_alike_and_every_time_to_the_same_bits(k: int) -> None:
    data = points(3000, 64)
    runs = {engine: [kmeans.fit(data, k, seed=2, iterations=10, engine=engine) for _ in range(2)] for engine in ENGINES}
    for one, again in runs.values():
        assert torch.equal(one.centroids, again.centroids)
        assert torch.equal(one.assignments, again.assignments)
        assert torch.equal(one.distances, again.distances)
        assert one.inertia == again.inertia
    assert runs["faiss"][0].inertia == pytest.approx(runs["torch"][0].inertia, rel=1e-5)


@pytest.mark.parametrize("k", [10, 30])
def test_a_point_without_a_finite_distance_has_a_cluster_all_the_same(k: int) -> None:
    data = points(5000, 30)
    data[7], data[8] = math.nan, 1e30
    by_faiss, by_torch = (kmeans.assign(data, points(k, 30, seed=1), engine=engine)[0] for engine in ENGINES)
    assert torch.equal(by_faiss, by_torch)
    assert by_torch.min() >= 0


def test_without_faiss_torch_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data, cpu = points(), torch.device("cpu")
    with_faiss = kmeans.fit(data, 10, seed=0, iterations=20)
    by_torch = kmeans.fit(data, 10, seed=0, iterations=20, engine="torch")
    monkeypatch.setattr(kmeans, "faiss", None)
    assert kmeans.engine_used("faiss", cpu) == "torch"
    without = kmeans.fit(data, 10, seed=0, iterations=20)
    assert torch.equal(without.assignments, by_torch.assignments)
    assert torch.equal(without.centroids, by_torch.centroids)
    assert torch.equal(without.assignments, with_faiss.assignments)
    assert without.inertia == pytest.approx(with_faiss.inertia, rel=1e-5)


@needs_faiss
def test_faiss_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert kmeans.engine_used("faiss", cpu) == "faiss"
    assert kmeans.engine_used("torch", cpu) == "torch"
    monkeypatch.setattr(kmeans.faiss, "StandardGpuResources", object, raising=False)
    for gpus, engine in [(0, "torch"), (1, "torch"), (2, "faiss")]:
        monkeypatch.setattr(kmeans.faiss, "get_num_gpus", lambda gpus=gpus: gpus)
        assert kmeans.engine_used("faiss", gpu) == engine
    monkeypatch.delattr(kmeans.faiss, "StandardGpuResources")
    assert kmeans.engine_used("faiss", gpu) == "torch"


def test_an_unknown_engine_is_refused() -> None:
    for attempt in (
        lambda: kmeans.fit(points(), 3, seed=0, iterations=5, engine="fais"),  # type: ignore[arg-type]
        lambda: kmeans.assign(points(), points(3), engine="fais"),  # type: ignore[arg-type]
        lambda: kmeans.engine_used("fais", torch.device("cpu")),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=r"faiss or torch.*'fais'.*name one"):
            attempt()


@needs_faiss
def test_a_search_leaves_faiss_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings() -> tuple[int, int]:
        return kmeans.faiss.omp_get_max_threads(), kmeans.faiss.cvar.distance_compute_blas_threshold

    before = settings()
    # The two may share one OpenMP, whose number of threads is then always torch's.
    monkeypatch.setattr(torch, "get_num_threads", lambda: before[0] + 1)
    for k in (10, 300):
        kmeans.assign(points(), points(k))
        assert settings() == before


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of clusters that faiss has searched among."""
    if kmeans.faiss is None:
        pytest.skip("faiss is not installed")
    counts: list[int] = []
    search = kmeans.faiss.knn

    def knn(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        counts.append(len(rows))
        found: tuple[np.ndarray, np.ndarray] = search(queries, rows, k)
        return found

    monkeypatch.setattr(kmeans.faiss, "knn", knn)
    return counts


def test_faiss_searches_by_default_and_torch_where_it_is_asked_for(searches: list[int]) -> None:
    kmeans.fit(points(), 10, seed=0, iterations=5)
    kmeans.assign(points(), points(10))
    assert set(searches) == {10}
    searches.clear()
    kmeans.fit(points(), 10, seed=0, iterations=5, engine="torch")
    kmeans.assign(points(), points(10), engine="torch")
    assert searches == []


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_of_pcl_and_deepcluster_v2_is_the_one_they_are_given(
    searches: list[int], engine: kmeans.Engine
) -> None:
    images, expected = normal(26, 1, 4, 4, seed=3), {10} if engine == "faiss" else set()
    deepcluster = DeepClusterV2(
        backbone(norm=True),
        8,
        hidden_dim=0,
        dim=6,
        prototypes=[10],
        temperature=0.1,
        assign_crops=[0],
        kmeans_iterations=5,
        kmeans_engine=engine,
        kmeans_restarts=1,
    )
    pcl = PCL(
        backbone(norm=True),
        8,
        hidden_dim=0,
        dim=6,
        key_momentum=0.9,
        queue_length=24,
        temperature=0.2,
        key_groups=1,
        clusters=[10],
        negatives=2,
        warmup_epochs=0,
        kmeans_iterations=5,
        kmeans_engine=engine,
        kmeans_restarts=1,
        kmeans_every=1,
        kmeans_warm_start=False,
        spherical=False,
    )
    for method in (deepcluster, pcl):
        method.bind(26)
        method.before_epoch(0, embedder(images), 0)
        assert set(searches) == expected
        searches.clear()


def test_inertia_never_rises_with_more_iterations() -> None:
    inertias = [kmeans.fit(points(), 10, seed=0, iterations=n, tolerance=0.0).inertia for n in range(1, 15)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(inertias))


def test_greedy_initialisation_finds_well_separated_groups_every_time() -> None:
    centres = 50 * points(20, seed=5)
    data = (centres[:, None] + points(20 * 30, seed=6).view(20, 30, 5)).reshape(-1, 5)
    truth = torch.arange(20).repeat_interleave(30)
    for seed in range(5):
        found = kmeans.fit(data, 20, seed=seed, iterations=20)
        assert len({(int(t), int(a)) for t, a in zip(truth, found.assignments, strict=True)}) == 20


def test_an_empty_cluster_moves_to_the_worst_served_point() -> None:
    data = torch.tensor([[0.0], [0.1], [0.2], [9.0]])
    centroids = torch.tensor([[0.1], [-50.0]])
    assignments = torch.zeros(4, dtype=torch.long)
    kmeans._refill(data, assignments, centroids, torch.tensor([4, 0]))
    assert centroids.tolist() == [[pytest.approx(0.1)], [9.0]]


def test_as_many_clusters_as_points_leave_no_distance() -> None:
    assert kmeans.fit(points(40), 40, seed=0, iterations=50).inertia == 0.0


def test_more_clusters_than_distinct_points_still_end() -> None:
    assert kmeans.fit(points(5).repeat(10, 1), 12, seed=0, iterations=20).inertia == pytest.approx(0.0, abs=1e-9)


def test_the_seed_decides_and_the_points_stay_as_they_are() -> None:
    data = points()
    before = data.clone()
    first, again, other = (kmeans.fit(data, 9, seed=s, iterations=5) for s in (1, 1, 2))
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)
    assert torch.equal(data, before)


def test_more_clusters_than_points_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"≤ 5.*k = 6"):
        kmeans.fit(points(5), 6, seed=0, iterations=5)


def test_points_that_are_not_finite_are_refused() -> None:
    data = points()
    data[3, 2] = math.nan
    with pytest.raises(DataError, match="finite"):
        kmeans.fit(data, 3, seed=0, iterations=5)


def unit_points(count: int = 600, dim: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(points(count, dim, seed), dim=1)


@pytest.mark.reference
def test_spherical_clusters_are_a_fixed_point_of_cosine_in_float64(seed: int) -> None:
    data = unit_points(seed=seed)
    found = kmeans.fit(data, 7, seed=seed, iterations=500, tolerance=0.0, spherical=True)
    exact, centroids = data.double().numpy(), found.centroids.double().numpy()
    cosines = exact @ centroids.T
    # Ties but for the last digits may fall either way.
    np.testing.assert_allclose(cosines[np.arange(600), found.assignments.numpy()], cosines.max(1), atol=1e-6)
    for cluster in range(7):
        total = exact[found.assignments.numpy() == cluster].sum(0)
        np.testing.assert_allclose(centroids[cluster], total / np.linalg.norm(total), atol=1e-6)
    assert found.inertia == pytest.approx(2 * (600 - cosines.max(1).sum()), rel=1e-5)


def test_without_spherical_the_centroids_of_unit_points_are_shorter() -> None:
    assert kmeans.fit(unit_points(), 7, seed=0, iterations=50).centroids.norm(dim=1).max() < 0.99


def test_restarts_keep_the_best_of_runs_that_differ_and_the_first_is_the_only_one_of_before() -> None:
    one, many = (kmeans.fit(points(), 12, seed=0, iterations=50, restarts=n) for n in (1, 6))
    runs = [
        kmeans._lloyd(
            points(),
            kmeans._plus_plus(points(), 12, kmeans.seeding.generator(0, "k-means", 12, *extra)),
            total=float(points().double().square().sum()),
            iterations=50,
            tolerance=1e-4,
            spherical=False,
            engine="faiss",
        ).inertia
        for extra in [(), (1,), (2,), (3,), (4,), (5,)]
    ]
    assert len(set(runs)) > 1
    assert one.inertia == runs[0]
    assert many.inertia == min(runs)


def test_a_warm_start_from_the_end_ends_there_and_leaves_it_as_it_is() -> None:
    cold = kmeans.fit(points(), 12, seed=0, iterations=500, tolerance=0.0)
    initial = cold.centroids.clone()
    warm = kmeans.fit(points(), 12, seed=1, iterations=500, tolerance=0.0, initial=initial)
    assert torch.equal(initial, cold.centroids)
    assert torch.equal(warm.assignments, cold.assignments)
    assert warm.iterations <= 2 < cold.iterations


def plain_concentration(distances: np.ndarray, assignments: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """Section 3.3 and the original's care for small clusters, by a loop."""
    raw = np.full(k, np.nan)
    for cluster in range(k):
        members = distances[assignments == cluster]
        if len(members) > 1:
            raw[cluster] = members.mean() / math.log(len(members) + 10)
    raw[np.isnan(raw)] = np.nanmax(raw)
    clipped = raw.clip(np.percentile(raw, 10), np.percentile(raw, 90))
    return temperature * clipped / clipped.mean()


@pytest.mark.reference
def test_concentration_is_the_papers_in_float64(seed: int) -> None:
    rng = np.random.default_rng(seed)
    distances = rng.gamma(2.0, size=90).astype(np.float32)
    assignments = (40 * rng.random(90) ** 2).astype(np.int64)  # some clusters are empty, some have one member
    sizes = np.bincount(assignments, minlength=40)
    assert (sizes <= 1).any()
    assert (sizes > 1).any()
    found = kmeans.concentration(torch.from_numpy(distances), torch.from_numpy(assignments), k=40, temperature=0.2)
    expected = plain_concentration(distances.astype(np.float64), assignments, 40, 0.2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_concentration_by_hand() -> None:
    assignments = torch.tensor([0, 0, 1, 1, 1, 2, 4, 4])  # cluster 2 is a singleton, 3 is empty
    distances = torch.tensor([1.0, 3.0, 0.5, 0.5, 0.5, 0.0, 4.0, 6.0])
    phi0 = 2.0 / math.log(12)
    phi1 = 0.5 / math.log(13)
    phi4 = 5.0 / math.log(12)
    raw = np.array([phi0, phi1, phi4, phi4, phi4])
    clipped = raw.clip(np.percentile(raw, 10), np.percentile(raw, 90))
    found = kmeans.concentration(distances, assignments, k=5, temperature=0.2)
    np.testing.assert_allclose(found.numpy(), 0.2 * clipped / clipped.mean(), rtol=1e-6)


def test_clusters_without_spread_all_get_the_temperature() -> None:
    found = kmeans.concentration(torch.zeros(6), torch.tensor([0, 0, 1, 1, 2, 2]), k=3, temperature=0.1)
    torch.testing.assert_close(found, torch.full((3,), 0.1))


def test_clusters_of_copies_keep_a_concentration_that_logits_can_be_divided_by() -> None:
    assignments = torch.arange(10).repeat_interleave(2)
    distances = torch.where(assignments < 3, 0.0, 1.0)  # three of ten clusters hold one point twice
    phi = kmeans.concentration(distances, assignments, k=10, temperature=0.2)
    assert phi[:3].tolist() == pytest.approx([0.002] * 3)
    assert phi[3:].tolist() == pytest.approx([0.2 / 0.7] * 7)
