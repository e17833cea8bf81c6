"""k-means by Lloyd's algorithm, and the concentration of its clusters.

One algorithm wherever it runs: seeded initialisation, means accumulated in float64, empty clusters moved to the worst
served points. Only the engine of the nearest-centroid search differs: faiss, on a CPU or a GPU, or torch's matrix
product. They find the same but for rounding, so that torch stands in where faiss is not installed or can not use the
GPU.

Under several processes each holds some of the points, the processes' rows after one another being the whole, and all
work as one: every decision is made on sums over all processes, so that all decide alike and end with the same
centroids. One process or many differ in the rounding of sums only. The points themselves are never copied whole, so
that they may be a memory map.

N points, of this process where there are several; K clusters, D dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust import distributed, seeding
from deepclust.errors import ConfigError, DataError

try:
    import faiss
except ImportError:  # GPU machines often have an image of their own without it
    faiss = None  # type: ignore[assignment]

# Numbers in one block of rows or distances. On a CPU it stays in the cache, four times faster at 784 dimensions; a GPU
# wants few launches.
_BLOCK_CPU, _BLOCK_GPU = 1 << 18, 1 << 26
_BLOCK_FAISS = 1 << 26  # numbers in what one call of faiss searches for; it works in blocks of its own
# Up to so many clusters faiss on a CPU is faster by differences, point by point, than by a matrix product: up to four
# times at 5 clusters, about as fast at 20 (measured).
_BY_DIFFERENCES = 20
_GPU_MEMORY = 256 << 20  # bytes that faiss keeps on a GPU for its blocks; by itself it would take 1.5 GiB
_LEAST_CONCENTRATION = 0.01  # of the mean; the clipping keeps all but clusters of copies far above it

Engine = Literal["faiss", "torch"]


@dataclass(frozen=True)
class Clusters:
    """A fitted k-means.

    Attributes:
        centroids: (K, D) float32, on the points' device, the same on all processes.
        assignments: (N,) int64, the nearest centroid of each of this process's points.
        distances: (N,) float32, Euclidean distance to it.
        inertia: Sum of the squared distances of all processes' points.
        iterations: Lloyd iterations made.
    """

    centroids: Tensor
    assignments: Tensor
    distances: Tensor
    inertia: float
    iterations: int


def fit(
    points_ND: Tensor,
    k: int,
    *,
    seed: int,
    iterations: int,
    initialisation: str = "k-means++",
    tolerance: float = 1e-4,
    spherical: bool = False,
    restarts: int = 1,
    initial: Tensor | None = None,
    engine: Engine = "faiss",
) -> Clusters:
    """Cluster points, those of all processes together.

    Args:
        points_ND: float32 points, this process's `distributed.share` of all; there may be none.
        k: Number of clusters.
        seed: Decides the initialisation.
        iterations: At most so many Lloyd iterations of a run.
        initialisation: `k-means++` (Arthur and Vassilvitskii, 2007; greedy) or `points`, k distinct random points.
        tolerance: Stop when the inertia falls by less than this share in one iteration.
        spherical: Bring the centroids to unit length after every mean; for points of unit length, where the nearest
            centroid is then the one of the largest cosine.
        restarts: Runs from initialisations of their own; the one with the smallest inertia counts.
        initial: Centroids (k, D) to start the only run from, in place of an initialisation; the same on all processes.
        engine: What searches for the nearest centroids; see `engine_used`.

    Raises:
        ConfigError: If k is not in 1..number of points, or the engine is unknown, on all processes.
        DataError: If a point is not finite, on all processes.
    """
    engine_used(engine, points_ND.device)  # refuses an unknown one
    _, count = _place(points_ND)
    if not 1 <= k <= count:
        raise ConfigError(f"expected 1 ≤ k ≤ {count}, the number of points; got k = {k}; lower it")
    assert initial is None or (restarts == 1 and len(initial) == k)
    points = points_ND.float().contiguous()
    squares = torch.zeros((), dtype=torch.float64, device=points.device)
    for block in _blocks(points):
        squares += block.double().square().sum()
    total = float(distributed.all_sum(squares))
    if not math.isfinite(total):  # squares of float32 can not overflow in float64
        raise DataError("expected finite points to cluster, got NaN or infinity; the encoder has diverged")
    best: Clusters | None = None
    for restart in range(restarts):
        if initial is None:
            generator = seeding.generator(seed, "k-means", k, *([restart] if restart else []))
            centroids = _INITIALISATIONS[initialisation](points, k, generator)
        else:
            centroids = F.normalize(initial.float(), dim=1) if spherical else initial.float().clone()
        found = _lloyd(points, centroids, total, iterations, tolerance, spherical, engine)
        if best is None or found.inertia < best.inertia:
            best = found
    assert best is not None, f"expected at least one run, got {restarts}"
    return best


def _lloyd(
    points: Tensor, centroids: Tensor, total: float, iterations: int, tolerance: float, spherical: bool, engine: Engine
) -> Clusters:
    """One run from `centroids`; `total` is the sum of the points' squared lengths."""
    k = len(centroids)
    previous = math.inf
    for iteration in range(1, iterations + 1):  # noqa: B007 - reported below
        assignments = _nearest(points, centroids, engine)
        sums, sizes = map(distributed.all_sum, _accumulate(points, assignments, k))
        centroids = (F.normalize(sums, dim=1) if spherical else sums / sizes.clamp(min=1)[:, None]).float()
        # Σ‖x − c‖² without another pass over the points.
        exact = centroids.double()
        inertia = total - 2 * float((exact * sums).sum()) + float((sizes * exact.square().sum(1)).sum())
        if (sizes == 0).any():
            _refill(points, assignments, centroids, sizes)
        elif inertia >= previous * (1 - tolerance):
            break
        previous = inertia
    assignments, squared = assign(points, centroids, engine=engine)
    inertia = float(distributed.all_sum(squared.sum(dtype=torch.float64)))
    return Clusters(centroids, assignments, squared.sqrt(), inertia, iteration)


def assign(points_ND: Tensor, centroids_KD: Tensor, *, engine: Engine = "faiss") -> tuple[Tensor, Tensor]:
    """The nearest centroid of each point, of equal centroids the first, and the squared Euclidean distance to it.

    Args:
        points_ND: float32.
        centroids_KD: float32, on the points' device.
        engine: What searches for the nearest centroids; see `engine_used`.

    Returns:
        Assignments (N,) int64 and squared distances (N,) float32, computed from the difference, so without the
        cancellation of the expanded square.

    Raises:
        ConfigError: If the engine is unknown.
    """
    assignments = _nearest(points_ND, centroids_KD, engine)
    return assignments, _squared_distances(points_ND, centroids_KD, assignments)


def _squared_distances(points: Tensor, centroids: Tensor, assignments: Tensor) -> Tensor:
    squared = points.new_empty(len(points))
    parts = zip(_blocks(points), _blocks(assignments, like=points), _blocks(squared, like=points), strict=True)
    for block, nearest, found in parts:
        found.copy_((block - centroids[nearest]).square_().sum(1))
    return squared


def _place(points: Tensor) -> tuple[int, int]:
    """Index of this process's first point among those of all processes, and the number of them all."""
    lengths = distributed.gather(torch.tensor([len(points)])).tolist()
    return sum(lengths[: distributed.rank()]), sum(lengths)


def _fetch(rows: Tensor, start: int, indices: Tensor) -> Tensor:
    """The rows of these indices among all processes' rows, on every process; `start` is the index of its own first."""
    own = (indices >= start) & (indices < start + len(rows))
    fetched = rows.new_zeros(len(indices), *rows.shape[1:])
    fetched[own] = rows[indices[own] - start]
    return distributed.all_sum(fetched)


def _blocks(rows: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Rows in blocks of bounded size; `like` another tensor with as many rows.

    What each block gives goes into a tensor made before: a list of small results between the large passing ones keeps
    the heap from shrinking, up to twice the points (measured).
    """
    width = (rows if like is None else like).shape[1]
    blocks: tuple[Tensor, ...] = torch.split(rows, max(1, _block(rows.device) // width))
    return blocks


def _block(device: torch.device) -> int:
    return _BLOCK_CPU if device.type == "cpu" else _BLOCK_GPU


def engine_used(engine: Engine, device: torch.device) -> Engine:
    """The engine that searches on this device: faiss only where it is installed and can use the device.

    Raises:
        ConfigError: If the engine is unknown.
    """
    if engine not in get_args(Engine):
        raise ConfigError(f"expected an engine of k-means (faiss or torch), got {engine!r}; name one of the two")
    if engine == "torch" or faiss is None:
        return "torch"
    if device.type == "cuda" and hasattr(faiss, "StandardGpuResources") and _index(device) < faiss.get_num_gpus():
        return "faiss"  # which was built for GPUs and sees this one
    return "faiss" if device.type == "cpu" else "torch"


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _nearest(points: Tensor, centroids: Tensor, engine: Engine) -> Tensor:
    if engine_used(engine, points.device) == "torch":
        nearest = _nearest_torch(points, centroids)
    else:
        nearest = (_nearest_faiss if points.device.type == "cpu" else _nearest_faiss_gpu)(points, centroids)
        # faiss numbers -1 what has no finite distance to any centroid; torch always names one.
        lost = nearest < 0
        if lost.any():
            nearest[lost] = _nearest_torch(points[lost], centroids)
    # Neither engine promises which of equal centroids it names, and faiss's matrix product does not name the first.
    _, groups = torch.unique(centroids, dim=0, return_inverse=True)
    numbers = torch.arange(len(centroids), device=centroids.device)
    firsts = numbers.scatter_reduce(0, groups, numbers, "amin", include_self=False)
    return firsts[groups][nearest]


def _nearest_faiss(points: Tensor, centroids: Tensor) -> Tensor:
    nearest = torch.empty(len(points), dtype=torch.int64)
    rows = max(1, _BLOCK_FAISS // centroids.shape[1])
    with _faiss_settings(by_differences=len(centroids) <= _BY_DIFFERENCES):
        for block, found in zip(torch.split(points, rows), torch.split(nearest, rows), strict=True):
            found.copy_(torch.from_numpy(faiss.knn(block.numpy(), centroids.numpy(), 1)[1][:, 0]))
    return nearest


@contextmanager
def _faiss_settings(*, by_differences: bool) -> Iterator[None]:
    """torch's number of threads, and how faiss computes distances: global to faiss, so put back."""
    threads, threshold = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    faiss.omp_set_num_threads(torch.get_num_threads())
    if by_differences:
        faiss.cvar.distance_compute_blas_threshold = 2**31 - 1
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
        faiss.cvar.distance_compute_blas_threshold = threshold


def _nearest_faiss_gpu(points: Tensor, centroids: Tensor) -> Tensor:
    import faiss.contrib.torch_utils  # teaches faiss torch's tensors and streams

    if not len(points):
        return torch.empty(0, dtype=torch.int64, device=points.device)
    index = _index(points.device)
    with torch.cuda.device(index):  # whose current stream faiss then works on
        _, nearest = faiss.knn_gpu(_gpu_resources(index), points.contiguous(), centroids.contiguous(), 1, device=index)
    return nearest[:, 0]


@functools.cache
def _gpu_resources(index: int) -> Any:
    """What faiss keeps on this GPU, made once: handles and working memory."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_GPU_MEMORY)
    return resources


def _nearest_torch(points: Tensor, centroids: Tensor) -> Tensor:
    half_norms = centroids.square().sum(1) / 2
    rows = max(1, _block(points.device) // max(centroids.shape))
    nearest = torch.empty(len(points), dtype=torch.int64, device=points.device)
    for block, found in zip(torch.split(points, rows), torch.split(nearest, rows), strict=True):
        found.copy_(torch.addmm(half_norms, block, centroids.T, alpha=-1).argmin(1))
    return nearest


def _accumulate(points: Tensor, assignments: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum (K, D) in float64 and number (K,) of each cluster's points."""
    sums = torch.zeros(k, points.shape[1], dtype=torch.float64, device=points.device)
    for block, nearest in zip(_blocks(points), _blocks(assignments, like=points), strict=True):
        sums.index_add_(0, nearest, block.double())
    return sums, torch.bincount(assignments, minlength=k)


def _refill(points: Tensor, assignments: Tensor, centroids: Tensor, sizes: Tensor) -> None:
    """Move each centroid without points to a point of its own, those farthest from their centroids first, in place.

    The sizes are those over all processes, and so are the farthest points; of equally far ones the first.
    """
    empty = (sizes == 0).nonzero().flatten()
    start, _ = _place(points)
    squared, order = torch.sort(_squared_distances(points, centroids, assignments), descending=True, stable=True)
    # Each process offers as many, those that it lacks at a distance below any.
    offered = squared.new_full((len(empty),), -1.0)
    indices = order.new_zeros(len(empty))
    offers = min(len(empty), len(points))
    offered[:offers], indices[:offers] = squared[:offers], order[:offers] + start
    farthest = torch.sort(distributed.gather(offered), descending=True, stable=True).indices[: len(empty)]
    centroids[empty] = _fetch(points, start, distributed.gather(indices)[farthest])


def _random_points(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    start, count = _place(points)
    return _fetch(points, start, torch.randperm(count, generator=generator)[:k].to(points.device))


def _plus_plus(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: of a few points drawn by squared distance to the nearest centroid, the one that helps most.

    Two plus log k candidates for each centroid, as in scikit-learn.
    """
    candidates = 2 + int(math.log(k))
    start, count = _place(points)
    norms = points.new_empty(len(points))
    for block, squares in zip(_blocks(points), _blocks(norms, like=points), strict=True):
        squares.copy_(block.square().sum(1))
    first = torch.randint(count, (1,), generator=generator).to(points.device)
    chosen = points.new_empty(k, points.shape[1])
    chosen[:1] = _fetch(points, start, first)
    closest = points.new_full((len(points),), math.inf)
    for near, with_first in _lowered(closest, points, norms, chosen[:1], _fetch(norms, start, first)):
        near.copy_(with_first[:, 0])
    for number in range(1, k):
        cumulative = closest.cumsum(0, dtype=torch.float64)
        weights = distributed.gather(cumulative[-1:].sum(0, keepdim=True))
        draws = torch.rand(candidates, generator=generator, dtype=torch.float64).to(points.device) * weights.sum()
        # How many points of all come before a draw: each process counts its own.
        before = torch.searchsorted(cumulative, draws - weights[: distributed.rank()].sum(), right=True)
        del cumulative  # twice the size of all else that grows with the points
        # Fewer distinct points than clusters leave no weight: any point will do then.
        drawn = distributed.all_sum(before).clamp(max=count - 1)
        rows, norms_of_rows = _fetch(points, start, drawn), _fetch(norms, start, drawn)
        sums = torch.zeros(candidates, dtype=torch.float64, device=points.device)
        for _, with_each in _lowered(closest, points, norms, rows, norms_of_rows):
            sums += with_each.sum(0, dtype=torch.float64)
        best = distributed.all_sum(sums).argmin()
        chosen[number] = rows[best]
        for near, with_best in _lowered(closest, points, norms, rows[best][None], norms_of_rows[best][None]):
            near.copy_(with_best[:, 0])
    return chosen


def _lowered(
    closest: Tensor, points: Tensor, norms: Tensor, others: Tensor, norms_of_others: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Block by block: the points' squared distances to the nearest, and what they are with each of a few others added.

    `norms` are squared lengths.
    """
    for block, squares, near in zip(
        _blocks(points), _blocks(norms, like=points), _blocks(closest, like=points), strict=True
    ):
        squared = (block @ others.T).mul_(-2).add_(squares[:, None]).add_(norms_of_others).clamp_(min=0)
        yield near, torch.minimum(near[:, None], squared, out=squared)


_INITIALISATIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "k-means++": _plus_plus,
    "points": _random_points,
}


def concentration(distances_N: Tensor, assignments_N: Tensor, *, k: int, temperature: float) -> Tensor:
    """Concentration φ of each cluster, the temperature of its prototype (PCL, arXiv 2005.04966, section 3.3).

    φ = mean ‖v − c‖₂ / log(n + 10) over the n members. Clusters of at most one member take the largest φ; then all are
    clipped to the 10th and 90th percentile and scaled so that their mean is the temperature. Clusters of identical
    points take a hundredth of the temperature at least. The members are those of all processes.

    Args:
        distances_N: Distance of each of this process's points to its raw, not normalised, centroid.
        assignments_N: Cluster of each point.
        k: Number of clusters.
        temperature: Mean of the result.

    Returns:
        (K,) float32.
    """
    sizes = distributed.all_sum(torch.bincount(assignments_N, minlength=k)).double()
    sums = torch.zeros(k, dtype=torch.float64, device=distances_N.device)
    sums = distributed.all_sum(sums.index_add_(0, assignments_N, distances_N.double()))
    phi = sums / sizes.clamp(min=1) / torch.log(sizes + 10)
    several = sizes > 1
    largest = phi[several].max() if several.any() else torch.ones((), dtype=torch.float64, device=phi.device)
    phi = torch.where(several, phi, largest)
    low, high = torch.quantile(phi, torch.tensor([0.1, 0.9], dtype=torch.float64, device=phi.device))
    phi = phi.clamp(low, high)
    mean = phi.mean()
    # All points on their centroids: every cluster is equally tight.
    phi = temperature * phi / mean if mean > 0 else torch.full_like(phi, temperature)
    # Where more than a tenth of the clusters are copies of one image, the low percentile is 0, and logits divide by φ.
    return phi.clamp(min=_LEAST_CONCENTRATION * temperature).float()
