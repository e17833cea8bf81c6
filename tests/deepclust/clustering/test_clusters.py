"""Clusters that were saved: the same to the bit, those of earlier versions, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepclust.clustering import clusters, confidence
from deepclust.clustering.assigners import Assigner, Centroids, Gaussians, Layers
from deepclust.errors import CheckpointError

RANDOM = torch.Generator().manual_seed(0)
POINTS = torch.randn(50, 6, generator=RANDOM)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RANDOM)


MAKE: dict[str, Callable[[], Assigner]] = {
    "centroids": lambda: Centroids.of(random(3, 6), POINTS),
    "linear": lambda: Layers([(random(3, 6), random(3))], unit=True),
    "head": lambda: Layers([(random(8, 6), random(8)), (random(3, 8), random(3))]),
    "gaussians": lambda: Gaussians(random(3, 6), random(3, 6).exp(), random(3)),
}


def made(kind: str = "linear", reject: float = 0.2) -> clusters.Clusters:
    one, *refits = (MAKE[kind]() for _ in range(3))
    points = torch.nn.functional.normalize(POINTS, dim=1)
    return confidence.fit(one, points, refits=refits, normalise=True, algorithm=kind, reject=reject)[0]


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("reject", [0, 0.2])
def test_what_was_saved_judges_alike_to_the_bit(kind: str, reject: float, tmp_path: Path) -> None:
    before = made(kind, reject)
    before.save(tmp_path)
    after = clusters.load(tmp_path, 6)
    assert (after.algorithm, after.normalise, after.reach, after.reject) == (kind, True, before.reach, before.reject)
    assert torch.equal(before.points(POINTS), after.points(POINTS))
    judged = before.judge(before.points(POINTS))
    for one, two in zip(judged, after.judge(after.points(POINTS)), strict=True):
        assert torch.equal(one, two)
    assert int((after.kept(judged) < 0).sum()) == 50 * reject


def test_folders_of_centroids_alone_are_the_nearest_centroid_and_reject_nothing(tmp_path: Path) -> None:
    centroids = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    np.save(tmp_path / "centroids.npy", centroids)
    (tmp_path / "cluster.json").write_text('{"k": 4, "normalise": false}\n')
    old = clusters.load(tmp_path, 6)
    (tmp_path / "again").mkdir()
    old.save(tmp_path / "again")
    far = 1e6 * torch.ones(1, 6)
    for found in (old, clusters.load(tmp_path / "again", 6)):
        judged = found.judge(torch.cat([POINTS, far]))
        distances = np.linalg.norm(torch.cat([POINTS, far]).numpy()[:, None] - centroids[None], axis=2)
        assert found.kept(judged).tolist() == distances.argmin(1).tolist()
        np.testing.assert_allclose(judged.distances, distances.min(1), rtol=1e-5)
        squared = np.sort(np.square(centroids[:, None] - centroids[None]).sum(2), axis=1)[:, 1]
        chances = np.exp(-np.square(distances[:50]) / squared.mean())
        np.testing.assert_allclose(judged.scores[:50], (chances.max(1) / chances.sum(1)), rtol=1e-4)
    for few in (centroids[:1], centroids[[0, 0]]):  # no distance between two centroids
        assert clusters.nearest(torch.from_numpy(few), normalise=False).judge(POINTS).scores.isfinite().all()


def _json(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "cluster.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "clusters.safetensors")
        change(tensors)
        save_file(tensors, folder / "clusters.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (_json(kind="trees"), r"clusters\.safetensors is damaged: expected the trees of 3 clusters of 6 features, got"),
        (_json(kind="centroids"), "expected the centroids of 3 clusters"),
        (_json(refits=3), r"clusters\.safetensors is damaged: expected the layers of 3 clusters"),
        (_json(refits=-1), r"cluster\.json is damaged: refits"),
        (_json(reach=-1.0), r"cluster\.json is damaged: reach"),
        (_json(reject="0.1"), r"cluster\.json is damaged: reject"),
        (_tensors(lambda all: all.pop("assigner.0.bias")), "expected the layers of 3 clusters"),
        (_tensors(lambda all: all.pop("matching.1")), "expected 3 numbers of clusters as matching.1"),
        (_tensors(lambda all: all["matching.0"].fill_(3)), "expected 3 numbers of clusters as matching.0"),
        (_tensors(lambda all: all.pop("bank.clusters")), "expected 50 numbers of clusters as bank.clusters"),
        (
            _tensors(lambda all: all.update({"bank.points": torch.ones(50, 5)})),
            r"expected points of 6 .*, got \(50, 5\)",
        ),
        (_tensors(lambda all: all["refit.0.0.weight"].fill_(torch.nan)), "expected finite weights"),
        (lambda folder: (folder / "clusters.safetensors").unlink(), r"clusters\.safetensors, found none"),
    ],
)
def test_damage_is_one_line_with_the_stage_to_run(damage: Callable[[Path], None], line: str, tmp_path: Path) -> None:
    made().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{line}.*; run its cluster stage$"):
        clusters.load(tmp_path, 6)


def test_clusters_of_other_features_are_refused(tmp_path: Path) -> None:
    made().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected centroids \(clusters, 7\) in .*, got \(3, 6\); .* embed and"):
        clusters.load(tmp_path, 7)
