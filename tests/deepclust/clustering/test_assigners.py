"""What assigns points is what it was after it was saved, and its probabilities are those of its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from deepclust.clustering import assigners, base
from deepclust.clustering.assigners import Assigner, Centroids, Gaussians, Layers
from deepclust.errors import CheckpointError

POINTS = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))


def _every_kind() -> list[Assigner]:
    draw = torch.Generator().manual_seed(1)
    means, bias = torch.randn(3, 5, generator=draw), torch.randn(3, generator=draw)
    hidden = (torch.randn(4, 5, generator=draw), torch.randn(4, generator=draw))
    return [
        Centroids.of(means, POINTS),
        Gaussians(means, means.square() + 0.1, bias.log_softmax(0)),
        Layers([(means, bias)]),
        Layers([hidden, (torch.randn(3, 4, generator=draw), bias)], unit=True),
    ]


@pytest.mark.parametrize("assigner", _every_kind(), ids=["centroids", "gaussians", "linear", "layers"])
def test_what_was_saved_assigns_as_before(assigner: Assigner) -> None:
    state = assigner.state()
    loaded = assigners.load(assigner.kind, state, k=3, dim=5)
    probabilities = assigner.probabilities(POINTS)
    assert torch.equal(loaded.probabilities(POINTS), probabilities)
    assert probabilities.sum(1).numpy() == pytest.approx(np.ones(40), abs=1e-5)
    assert torch.equal(assigner.assign(POINTS), probabilities.argmax(1))
    for wrong in (state | {"more": torch.zeros(1)}, dict([*state.items()][1:]), {}):
        with pytest.raises(CheckpointError, match=rf"^expected the {assigner.kind} of 3 clusters of 5 features, got"):
            assigners.load(assigner.kind, wrong, k=3, dim=5)
    with pytest.raises(CheckpointError):
        assigners.load(assigner.kind, state, k=4, dim=5)
    with pytest.raises(CheckpointError):
        assigners.load(assigner.kind, state, k=3, dim=6)


def test_probabilities_of_centroids_fall_with_the_squared_distance_in_its_mean() -> None:
    centroids = torch.tensor([[0.0], [2.0]])
    points = torch.tensor([[0.0], [1.0], [3.0]])
    found = Centroids.of(centroids, points)
    assert found.scale == pytest.approx((0 + 1 + 1) / 3)
    odds = found.probabilities(points)[0, 0] / found.probabilities(points)[0, 1]
    assert odds.item() == pytest.approx(np.exp(4 / found.scale), rel=1e-5)
    assert found.assign(points).tolist() == [0, 0, 1]


def test_responsibilities_of_gaussians_are_scikit_learns() -> None:
    mixture = GaussianMixture(3, covariance_type="diag", random_state=0).fit(POINTS.numpy())
    ours = Gaussians(
        *(torch.from_numpy(each).float() for each in (mixture.means_, mixture.covariances_)),
        torch.from_numpy(np.log(mixture.weights_)).float(),
    )
    assert ours.probabilities(POINTS).numpy() == pytest.approx(mixture.predict_proba(POINTS.numpy()), abs=1e-4)


def test_a_classifier_repeats_clusters_that_a_line_divides_and_learns_nothing_of_noise() -> None:
    clusters = (POINTS[:, 0] > 0).long()
    clusters[5:10] = -1
    found = assigners.classifier(POINTS, clusters, 2)
    assert torch.equal(found.assign(POINTS)[clusters >= 0], clusters[clusters >= 0])


def test_means_leave_out_what_has_no_cluster() -> None:
    found = base.means(torch.tensor([[1.0], [3.0], [9.0], [5.0]]), torch.tensor([0, 0, -1, 2]), 3)
    assert found[[0, 2]].flatten().tolist() == [2, 5]
    assert found[1].isnan()
