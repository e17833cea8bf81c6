"""PCL against the formulas of the paper in float64, by loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax

from deepclust.clustering import kmeans
from deepclust.errors import ConfigError
from deepclust.methods.pcl import PCL, proto_nce
from tests.deepclust.clustering.test_kmeans import plain_concentration
from tests.deepclust.methods.toys import Array, backbone, build, embedder, exact_rows, normal, unit, update

IMAGES = 60
DATA = normal(IMAGES, 1, 4, 4, seed=3)


def toy(seed: int = 0, **changes: object) -> PCL:
    torch.manual_seed(seed)
    options = {"hidden_dim": 0, "batch_size": 12, "queue_length": 24, "key_groups": 1, "negatives": 8, "epochs": 9}
    options |= {"kmeans_every": 1, "kmeans_warm_start": False, "spherical": False, "kmeans_restarts": 1}
    method: PCL = build("pcl", backbone(norm=True), 8, **(options | changes))
    method.bind(IMAGES)
    return method


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
        total -= log_softmax(logits)[columns.index(cluster)] / len(own)
    return total


def test_more_negatives_than_clusters_are_left_are_refused_with_the_numbers() -> None:
    q, c, own = unit(4, 5, seed=0), unit(9, 5, seed=1), torch.tensor([1, 2, 2, 4])
    proto_nce(q, c, torch.ones(9), own, negatives=6, generator=torch.Generator())
    with pytest.raises(ConfigError, match=r"at most 6, the clusters of 9 .* batch of 4; got 7"):
        proto_nce(q, c, torch.ones(9), own, negatives=7, generator=torch.Generator())


@pytest.mark.reference
@pytest.mark.parametrize(("spherical", "negatives"), [(False, 8), (True, 1)])
def test_the_e_step_clusters_the_momentum_features_and_the_loss_is_the_papers_in_float64(
    seed: int, spherical: bool, negatives: int
) -> None:
    method = toy(seed, spherical=spherical, negatives=negatives, kmeans_iterations=200)
    images = normal(IMAGES, 1, 4, 4, seed=seed)
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
            expected = mean / (np.linalg.norm(mean) if spherical else 1)
            np.testing.assert_allclose(centroids[cluster], expected, atol=1e-5)
        prototypes = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
        np.testing.assert_allclose(clustering.prototypes.numpy(), prototypes, atol=1e-6)
        phi = plain_concentration(distances, assignments, len(clustering), 0.2)
        np.testing.assert_allclose(clustering.concentrations.numpy(), phi, rtol=1e-4)
        clusters = assignments[own].tolist()
        losses.append(plain_proto_nce(queries, prototypes, phi, clusters, negatives=negatives, generator=generator))
    method.before_step(0)
    loss, logged = method.loss(views, own, torch.Generator().manual_seed(seed))
    assert float(logged["proto_nce"]) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(loss.detach()) == pytest.approx(float(logged["info_nce"] + logged["proto_nce"]), rel=1e-6)


def test_after_a_warm_up_which_is_mocos_e_steps_come_every_so_many_epochs() -> None:
    method = toy(warmup_epochs=2, kmeans_every=3)
    centroids, changed = torch.zeros(20, 6), []
    for epoch in range(9):
        method.before_epoch(epoch, embedder(DATA), epoch)  # without a warm start, so each is another start
        now = method._granularities()[0].centroids.clone()
        changed += [] if torch.equal(now, centroids) else [epoch]
        centroids = now
        ((loss, logged),) = update(method, epoch, [DATA[:6], DATA[6:12]], torch.arange(6), rate=0.0)
        assert (float(loss) == float(logged["info_nce"])) == ("proto_nce" not in logged) == (epoch < 2)
    assert changed == [2, 5, 8]
    assert method.queue.pushed == 9 * 6


def test_a_warm_start_begins_from_the_last_centroids_of_its_granularity() -> None:
    method = toy(warmup_epochs=0, kmeans_warm_start=True, kmeans_restarts=3)
    method.before_epoch(0, embedder(DATA), 0)
    before = [clustering.centroids.clone() for clustering in method._granularities()]
    method.key_encoder[1].weight.data.add_(0.3 * normal(6, 8, seed=9))
    method.before_epoch(1, embedder(DATA), 1)
    features = F.normalize(embedder(DATA)(method.key_encoder), dim=1)
    for k, clustering, initial in zip((20, 30), method._granularities(), before, strict=True):
        warm = kmeans.fit(features, k, seed=1, iterations=5, initial=initial)
        assert torch.equal(clustering.centroids, warm.centroids)
