"""Nearest-centroid search on the CPU: faiss against the blocked matrix product of deepclust.clustering.kmeans.

python benchmarks/search.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from deepclust.clustering import kmeans

POINTS = 54_000


def seconds(search: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *tensors: torch.Tensor) -> list[float]:
    """Five timings, sorted."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        search(*tensors)
        taken.append(time.perf_counter() - started)
    return sorted(taken)


def main() -> None:
    """Print the median and the spread of each, one thread."""
    torch.set_num_threads(1)
    for dim, k in ((784, 10), (784, 50), (128, 10), (128, 50), (64, 500), (64, 2000)):
        points = torch.randn(POINTS, dim, generator=torch.Generator().manual_seed(0))
        centroids = points[:k].clone()
        with_faiss = seconds(kmeans._nearest_faiss, points, centroids)
        with_torch = seconds(kmeans._nearest_torch, points, centroids)
        print(
            f"{POINTS} x {dim}, k {k}: faiss {with_faiss[2] * 1e3:.0f} ms ({with_faiss[0] * 1e3:.0f}-"
            f"{with_faiss[4] * 1e3:.0f}), torch {with_torch[2] * 1e3:.0f} ms ({with_torch[0] * 1e3:.0f}-"
            f"{with_torch[4] * 1e3:.0f}), ratio {with_faiss[2] / with_torch[2]:.2f}"
        )


if __name__ == "__main__":
    main()
