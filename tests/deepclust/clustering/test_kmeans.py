"""Lloyd's algorithm against scikit-learn and brute force in float64; φ by hand and by a loop."""

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from deepclust.clustering import kmeans
from tests.deepclust.methods.toys import embedder, normal
from tests.deepclust.training import test_loop

ENGINES: tuple[kmeans.Engine, ...] = ("faiss", "torch")
needs_faiss = pytest.mark.skipif(kmeans.faiss is None, reason="faiss is not installed")


def points(count: int = 600, dim: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_a_fixed_start_ends_where_scikit_learn_ends() -> None:
    data, start = points(), points(8, seed=1)
    expected = KMeans(8, init=start.numpy(), n_init=1, max_iter=500, tol=0).fit(data.numpy())
    found = kmeans.fit(data, 8, seed=3, iterations=500, initial=start, tolerance=0.0)
    assert found.inertia == pytest.approx(expected.inertia_, rel=1e-5)
    assert (found.assignments.numpy() == expected.labels_).all()
    np.testing.assert_allclose(found.centroids.numpy(), expected.cluster_centers_, atol=1e-5)


@pytest.mark.parametrize(("k", "dim"), [(3, 12), (20, 128), (21, 12), (300, 128)])  # by differences up to 20
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
@pytest.mark.parametrize(("k", "dim"), [(2, 1), (10, 128), (33, 5), (260, 128)])
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
    runs = {engine: [kmeans.fit(data, k, seed=2, iterations=5, engine=engine) for _ in range(2)] for engine in ENGINES}
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


@needs_faiss
def test_faiss_searches_unless_torch_is_asked_for_and_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings() -> tuple[int, int]:
        return kmeans.faiss.omp_get_max_threads(), kmeans.faiss.cvar.distance_compute_blas_threshold

    def knn(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        counts.append(len(rows))
        found: tuple[np.ndarray, np.ndarray] = search(queries, rows, k)
        return found

    counts: list[int] = []
    search, before = kmeans.faiss.knn, settings()
    monkeypatch.setattr(kmeans.faiss, "knn", knn)
    # The two may share one OpenMP, whose number of threads is then always torch's.
    monkeypatch.setattr(torch, "get_num_threads", lambda: before[0] + 1)
    for k in (10, 300):
        for engine, searched in (("faiss", {k}), ("torch", set())):
            counts.clear()
            kmeans.assign(points(), points(k), engine=engine)
            kmeans.fit(points(), k, seed=0, iterations=2, engine=engine)
            assert set(counts) == searched
            assert settings() == before


@needs_faiss
@pytest.mark.parametrize("name", ["pcl", "deepcluster_v2"])
def test_a_method_searches_with_the_engine_that_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[kmeans.Engine] = []
    fit = kmeans.fit
    monkeypatch.setattr(
        kmeans, "fit", lambda *given, **options: engines.append(options["engine"]) or fit(*given, **options)
    )
    for engine in ENGINES:
        method = test_loop.build(name, kmeans_engine=engine, **({"warmup_epochs": 0} if name == "pcl" else {}))
        method.bind(70)
        method.before_epoch(0, embedder(normal(70, 1, 16, 16, seed=3)), 0)
        assert set(engines) == {engine}
        engines.clear()


def test_greedy_initialisation_finds_well_separated_groups_every_time() -> None:
    centres = 50 * points(20, seed=5)
    data = (centres[:, None] + points(20 * 30, seed=6).view(20, 30, 5)).reshape(-1, 5)
    truth = torch.arange(20).repeat_interleave(30)
    for seed in range(5):
        found = kmeans.fit(data, 20, seed=seed, iterations=20)
        assert len({(int(t), int(a)) for t, a in zip(truth, found.assignments, strict=True)}) == 20


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
    assert kmeans.fit(data, 7, seed=seed, iterations=50).centroids.norm(dim=1).max() < 0.99, "without it, shorter"


def test_restarts_keep_the_best_of_runs_that_differ_and_the_first_is_the_only_one_of_before() -> None:
    found = [kmeans.fit(points(), 12, seed=0, iterations=50, restarts=n).inertia for n in range(1, 7)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]
    start = kmeans._plus_plus(points(), 12, kmeans.seeding.generator(0, "k-means", 12))
    assert kmeans.fit(points(), 12, seed=9, iterations=50, initial=start).inertia == found[0]


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
    assert {0, 1} < set(sizes.tolist())
    found = kmeans.concentration(torch.from_numpy(distances), torch.from_numpy(assignments), k=40, temperature=0.2)
    expected = plain_concentration(distances.astype(np.float64), assignments, 40, 0.2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_clusters_of_copies_keep_a_concentration_that_logits_can_be_divided_by() -> None:
    assignments = torch.arange(10).repeat_interleave(2)
    distances = torch.where(assignments < 3, 0.0, 1.0)  # three of ten clusters hold one point twice
    phi = kmeans.concentration(distances, assignments, k=10, temperature=0.2)
    assert phi[:3].tolist() == pytest.approx([0.002] * 3)
    assert phi[3:].tolist() == pytest.approx([0.2 / 0.7] * 7)
