"""PCL against the formulas of the paper in float64, by loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepclust.clustering import kmeans
from deepclust.errors import ConfigError
from deepclust.methods.pcl import PCL, Config, proto_nce
from tests.deepclust.clustering.test_kmeans import plain_concentration
from tests.deepclust.methods.toys import Array, backbone, embedder, exact_rows, log_softmax, normal, unit, update

IMAGES = 60


def toy(seed: int = 0, **changes: object) -> PCL:
    torch.manual_seed(seed)
    options = {
        "hidden_dim": 0,
        "dim": 6,
        "key_momentum": 0.9,
        "queue_length": 24,
        "key_groups": 1,
        "batch_size": 12,
        "clusters": [20, 30],
        "negatives": 8,
        "warmup_epochs": 1,
        "kmeans_iterations": 5,
    }
    method = PCL(backbone(norm=True), 8, Config(**(options | changes)))  # type: ignore[arg-type]
    method.bind(IMAGES)
    return method


def data(seed: int = 3) -> torch.Tensor:
    return normal(IMAGES, 1, 4, 4, seed=seed)


def plain_proto_nce(
    queries: Array, prototypes: Array, phi: Array, own: list[int], *, negatives: int, generator: torch.Generator
) -> float:
    """Equation 11, one granularity, by loops; the draw is the same: the largest of uniform numbers in order."""
    order = torch.rand(len(prototypes), generator=generator).tolist()
    free = sorted(set(range(len(prototypes))) - set(own), key=lambda cluster: -order[cluster])
    columns = sorted({*own, *free[:negatives]})
    total = 0.0
    for query, cluster in zip(queries, own, strict=True):
        logits = np.array([query @ prototypes[column] / phi[column] for column in columns])
        total -= log_softmax(logits[None])[0][columns.index(cluster)] / len(own)
    return total


@pytest.mark.reference
@pytest.mark.parametrize("negatives", [5, 3, 0])
def test_proto_nce_is_the_papers_in_float64(seed: int, negatives: int) -> None:
    q, c = unit(6, 5, seed=seed), unit(9, 5, seed=seed + 1)
    phi = torch.rand(9, generator=torch.Generator().manual_seed(seed)) * 0.3 + 0.1
    own = [0, 0, 3, 5, 5, 8]
    exact = [x.double().numpy() for x in (q, c, phi)]
    found = proto_nce(q, c, phi, torch.tensor(own), negatives=negatives, generator=torch.Generator().manual_seed(seed))
    expected = plain_proto_nce(*exact, own, negatives=negatives, generator=torch.Generator().manual_seed(seed))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_negatives_are_nobodys_positive_and_as_many_as_asked() -> None:
    q, c = torch.zeros(4, 5), unit(30, 5, seed=0)
    own = torch.tensor([2, 2, 7, 11])
    # With zero queries every logit is 0, so the loss is the log of the number of columns.
    found = proto_nce(q, c, torch.ones(30), own, negatives=6, generator=torch.Generator().manual_seed(0))
    assert math.exp(float(found)) == pytest.approx(3 + 6, rel=1e-5)


def test_negatives_differ_between_steps_and_repeat_with_the_generator() -> None:
    q, c, own = unit(4, 5, seed=0), unit(50, 5, seed=1), torch.tensor([1, 2, 3, 4])
    losses = [
        float(proto_nce(q, c, torch.ones(50), own, negatives=5, generator=torch.Generator().manual_seed(s)))
        for s in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_more_negatives_than_clusters_are_left_are_refused_with_the_numbers() -> None:
    q, c, own = unit(4, 5, seed=0), unit(9, 5, seed=1), torch.tensor([1, 2, 2, 4])
    proto_nce(q, c, torch.ones(9), own, negatives=6, generator=torch.Generator())
    with pytest.raises(ConfigError, match=r"at most 6, the clusters of 9 .* batch of 4; got 7") as error:
        proto_nce(q, c, torch.ones(9), own, negatives=7, generator=torch.Generator())
    assert "\n" not in str(error.value)


@pytest.mark.reference
@pytest.mark.parametrize("spherical", [False, True])
def test_the_e_step_clusters_the_momentum_features_and_the_loss_is_the_papers_in_float64(
    seed: int, spherical: bool
) -> None:
    method = toy(seed, spherical=spherical, kmeans_iterations=200)
    images = data(seed)
    with torch.no_grad():  # the two encoders are to differ
        for parameter in method.key_encoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    for epoch in range(2):
        method.before_epoch(epoch, embedder(images), seed)
    features = exact_rows(method.key_encoder.eval(), images)
    method.key_encoder.train()
    own = torch.arange(0, IMAGES, 10)
    views = [images[own], images[own + 1]]
    queries = exact_rows(torch.nn.Sequential(method.backbone, method.head), views[0])
    losses, generator = [], torch.Generator().manual_seed(seed)
    for clustering in method._granularities():
        assignments = clustering.assignments.numpy()
        centroids = clustering.centroids.double().numpy()
        distances = np.linalg.norm(features - centroids[assignments], axis=1)
        everywhere = np.linalg.norm(features[:, None] - centroids[None], axis=2)
        np.testing.assert_allclose(distances, everywhere.min(1), atol=1e-5)
        for cluster in np.unique(assignments):
            mean = features[assignments == cluster].mean(0)
            expected = mean / np.linalg.norm(mean) if spherical else mean
            np.testing.assert_allclose(centroids[cluster], expected, atol=1e-5)
        prototypes = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
        np.testing.assert_allclose(clustering.prototypes.numpy(), prototypes, atol=1e-6)
        phi = plain_concentration(distances, assignments, len(clustering), 0.2)
        np.testing.assert_allclose(clustering.concentrations.numpy(), phi, rtol=1e-4)
        clusters = assignments[own].tolist()
        losses.append(plain_proto_nce(queries, prototypes, phi, clusters, negatives=8, generator=generator))
    method.before_step(0)
    loss, logged = method.loss(views, own, torch.Generator().manual_seed(seed))
    assert float(logged["proto_nce"]) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(loss.detach()) == pytest.approx(float(logged["info_nce"] + logged["proto_nce"]), rel=1e-6)


def test_the_warm_up_is_mocos() -> None:
    method = toy()
    method.before_epoch(0, embedder(data()), 0)
    method.before_step(0)
    loss, logged = method.loss([data()[:6], data()[6:12]], torch.arange(6), torch.Generator())
    assert float(loss.detach()) == float(logged["info_nce"])
    assert "proto_nce" not in logged
    assert sum(clustering.prototypes.abs().sum() for clustering in method._granularities()) == 0


def test_e_steps_come_after_the_warm_up_and_then_every_so_many_epochs() -> None:
    method = toy(warmup_epochs=2, kmeans_every=3)
    embedded: list[int] = []
    for epoch in range(9):
        method.before_epoch(epoch, lambda module: embedded.append(epoch) or embedder(data())(module), epoch)  # type: ignore[func-returns-value]  # noqa: B023
    assert embedded == [2, 5, 8]


def test_a_warm_start_begins_from_the_last_centroids_of_its_granularity() -> None:
    method = toy(warmup_epochs=0, kmeans_warm_start=True, kmeans_restarts=3)
    method.before_epoch(0, embedder(data()), 0)
    features = F.normalize(embedder(data())(method.key_encoder), dim=1)
    for k, clustering in zip((20, 30), method._granularities(), strict=True):
        cold = kmeans.fit(features, k, seed=0, iterations=5, initialisation="points", restarts=3)
        assert torch.equal(clustering.centroids, cold.centroids)
    before = [clustering.centroids.clone() for clustering in method._granularities()]
    with torch.no_grad():
        method.key_encoder[1].weight.add_(0.3 * normal(6, 8, seed=9))
    method.before_epoch(1, embedder(data()), 1)
    features = F.normalize(embedder(data())(method.key_encoder), dim=1)
    for k, clustering, initial in zip((20, 30), method._granularities(), before, strict=True):
        warm = kmeans.fit(features, k, seed=1, iterations=5, initial=initial)
        assert torch.equal(clustering.centroids, warm.centroids)
        assert torch.equal(clustering.assignments, warm.assignments)


def test_every_e_step_is_a_new_start_without_warm_start() -> None:
    method = toy(warmup_epochs=0)
    found = []
    for seed in (0, 1):
        method.before_epoch(seed, embedder(data()), seed)
        found.append(method._granularities()[0].centroids.clone())
    assert not torch.equal(*found)


def test_the_queue_and_the_momentum_encoder_are_mocos() -> None:
    method = toy()
    update(method, 0, [([data()[:8], data()[8:16]], torch.arange(8))], rate=0.1)
    assert int(method.queue.pushed) == 8


def test_more_clusters_than_images_are_refused_with_both_numbers() -> None:
    toy(clusters=[20, 60]).check(60)
    with pytest.raises(ConfigError, match=r"60.*got 99"):
        toy(clusters=[20, 99]).check(60)
