"""An encoder with clusters and classifier, read from one folder or from several, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deepclust import bundle
from deepclust.clustering import clusters, confidence
from deepclust.clustering.assigners import Layers
from deepclust.errors import CheckpointError
from deepclust.images.reading import Reading
from deepclust.methods.pixels import pixels
from deepclust.models import encoder

IMAGES = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(params=[False, True], ids=["raw", "unit length"])
def made(request: pytest.FixtureRequest) -> bundle.Bundle:
    random = torch.Generator().manual_seed(0)
    return bundle.Bundle(
        encoder=pixels(image_size=8, channels=1).eval(),
        clusters=clusters.nearest(torch.rand((4, 64), generator=random) / 4, normalise=request.param),
        classifier=bundle.Classifier(
            ["a", "b", "ü"], torch.randn((3, 64), generator=random), torch.randn(3, generator=random)
        ),
        reading=Reading(resize="pad"),
    )


def test_images_go_to_the_nearest_centroid_and_class_in_float64(made: bundle.Bundle) -> None:
    found = made.assign(IMAGES, batch_size=4)
    points = IMAGES.reshape(9, 64).astype(np.float64) / 255
    np.testing.assert_allclose(found.features, points, atol=1e-6)
    compared = points / np.linalg.norm(points, axis=1, keepdims=True) if made.clusters.normalise else points
    distances = np.linalg.norm(compared[:, None] - made.clusters.centroids.double().numpy(), axis=2)
    assert found.clusters.tolist() == distances.argmin(1).tolist()
    np.testing.assert_allclose(found.distances, distances.min(1), rtol=1e-5)
    assert made.classifier
    scores = points @ made.classifier.weight.double().numpy().T + made.classifier.bias.double().numpy()
    chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, chances, atol=1e-5)


def test_images_of_which_the_clusters_are_not_sure_enough_have_none(made: bundle.Bundle, tmp_path: Path) -> None:
    points = made.clusters.points(torch.from_numpy(IMAGES.reshape(9, 64).astype(np.float32) / 255))
    one, other = (Layers([(scale * made.clusters.centroids, torch.zeros(4))]) for scale in (3, 5))
    sure: dict[str, Any] = {"normalise": made.clusters.normalise, "algorithm": "spectral"}
    fitted = confidence.fit(one, points, refits=[other], reject=1 / 3, **sure)[0]
    dataclasses.replace(made, clusters=fitted).save(tmp_path)
    found = bundle.load(tmp_path).assign(IMAGES)
    assert fitted.reject
    assert (found.clusters == -1).sum() == 3
    assert found.confidences[found.clusters < 0].max() < fitted.reject <= found.confidences[found.clusters >= 0].min()
    judged = fitted.judge(points)
    kept = found.clusters >= 0
    np.testing.assert_array_equal(found.clusters[kept], judged.clusters[kept])
    np.testing.assert_allclose(found.distances, judged.distances, rtol=1e-4)
    assert (found.distances > 0).all(), "of rejected ones too"


def test_what_was_saved_assigns_alike_to_the_bit(made: bundle.Bundle, tmp_path: Path) -> None:
    made.save(tmp_path)
    again = bundle.load(tmp_path)
    assert (again.classes, again.reading.resize, again.image_size, again.channels) == (["a", "b", "ü"], "pad", 8, 1)
    for before, after in zip(made.assign(IMAGES), again.assign(IMAGES), strict=True):
        np.testing.assert_array_equal(before, after)
    # The parts may lie in folders of their own, and a classifier may be missing.
    alone, empty = tmp_path / "alone", tmp_path / "empty"
    alone.mkdir()
    encoder.save(made.encoder, alone)
    found = bundle.load(alone, clusters=tmp_path, classifier=empty, statistics=tmp_path / bundle.STATISTICS)
    assert found.classes == []
    assert found.assign(IMAGES).probabilities is None


def test_parts_of_another_encoder_or_without_a_description_are_refused(made: bundle.Bundle, tmp_path: Path) -> None:
    made.save(tmp_path)
    save_file({"weight": torch.zeros(3, 7), "bias": torch.zeros(3)}, tmp_path / bundle.WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"3 classes, 64 features.* got bias .* weight \(3, 7\).*run its embed and linear"
    ):
        bundle.load(tmp_path)
    made.save(tmp_path)
    path = tmp_path / bundle.STATISTICS
    path.unlink()
    with pytest.raises(CheckpointError, match=r"found none; run prepare$"):
        bundle.load(tmp_path)
    path.write_text('{"resize": "zoom"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"got 'zoom'.*run prepare$"):
        bundle.load(tmp_path)
