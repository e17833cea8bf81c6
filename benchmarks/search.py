"""Nearest-centroid search on the CPU: the two engines of deepclust.clustering.kmeans against one another.

python benchmarks/search.py
"""

from __future__ import annotations

import time

import torch

from deepclust.clustering import kmeans

POINTS, REPEATS = 60_000, 7
DIMS, CLUSTERS = (64, 128, 784), (5, 10, 20, 30, 100, 256, 1000)


def seconds(engine: kmeans.Engine, points: torch.Tensor, centroids: torch.Tensor) -> float:
    """One search."""
    started = time.perf_counter()
    kmeans._nearest(points, centroids, engine)
    return time.perf_counter() - started


def main() -> None:
    """Print the median and the spread of each, one thread; the engines take turns."""
    torch.set_num_threads(1)
    print("| dimensions | clusters | faiss, ms | torch, ms | faiss / torch |\n|---|---|---|---|---|")
    for dim in DIMS:
        points = torch.randn(POINTS, dim, generator=torch.Generator().manual_seed(0))
        for k in CLUSTERS:
            engines: tuple[kmeans.Engine, ...] = ("faiss", "torch")
            taken: dict[kmeans.Engine, list[float]] = {engine: [] for engine in engines}
            for repeat in range(REPEATS + 1):
                for engine in engines:
                    duration = seconds(engine, points, points[:k].clone())
                    if repeat:  # the first warms up
                        taken[engine].append(1e3 * duration)
            low, middle, high = ({e: sorted(taken[e])[i] for e in engines} for i in (0, REPEATS // 2, -1))
            cells = (f"{middle[e]:.1f} ({low[e]:.1f}–{high[e]:.1f})" for e in engines)
            print(f"| {dim} | {k} | {' | '.join(cells)} | {middle['faiss'] / middle['torch']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
