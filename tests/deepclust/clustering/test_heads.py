"""Learned heads: the papers' formulas by loops in float64, toy points, and what becomes of heads that collapse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from deepclust import seeding
from deepclust.clustering import algorithms, assigners, heads
from deepclust.clustering.algorithms import dec, scan, spectral, swav_head, temi
from deepclust.clustering.base import Points, Problem
from deepclust.config import Config
from deepclust.errors import CheckpointError
from deepclust.evaluation import metrics

HEADS = ("dec", "scan", "swav_head", "temi")
BATCH, MANY, K = 7, 3, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(count: int = 40, k: int = 6, dim: int = 16, spread: float = 0.15) -> tuple[Tensor, NDArray[np.int64]]:
    """Points around orthogonal directions, of lengths that differ, in a fixed disorder."""
    truth = torch.arange(k).repeat(count)
    points = torch.eye(k, dim)[truth] + spread * normal(k * count, dim)
    return points * (1 + normal(k * count, 1, seed=1).abs()), truth.numpy()


def options(name: str) -> Config:
    """Quick ones."""
    kind = algorithms.config_class(name)
    if name == "scan":
        return kind(steps=50, heads=2, batch=64, self_labelling=True)
    return kind(steps=25, interval=10) if name == "dec" else kind(steps=25, heads=2, batch=64)


def fit(name: str, points: Tensor, k: int, seed: int = 0) -> assigners.Assigner:
    return algorithms.fit(name, Problem(points=Points(points), k=k, seed=seed), options(name))


def answers(seed: int) -> tuple[Tensor, NDArray[np.float64]]:
    """Log-probabilities (B, H, K), and the probabilities in float64."""
    logits = 3 * normal(BATCH, MANY, K, seed=seed)
    exact = np.exp(logits.double().numpy())
    return logits.log_softmax(2), exact / exact.sum(2, keepdims=True)


@pytest.mark.reference
def test_temi_is_the_papers_in_float64(seed: int) -> None:
    (student, q_s), (teacher, q_t), (other, q_o) = (answers(3 * seed + n) for n in range(3))
    marginal = q_t.mean(0)
    found = temi.pmi(student, teacher, torch.from_numpy(marginal), 0.6)
    weight = temi.agreement(teacher, other)
    for b in range(BATCH):
        agreements = []
        for h in range(MANY):
            expected = sum((q_s[b, h, c] * q_t[b, h, c]) ** 0.6 / marginal[h, c] for c in range(K))
            assert found[b, h] == pytest.approx(np.log(expected), rel=1e-5, abs=1e-6)
            agreements.append(sum(q_t[b, h, c] * q_o[b, h, c] for c in range(K)))
        assert weight[b] == pytest.approx(np.mean(agreements), rel=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_temis_loss_is_symmetric_and_its_marginal_and_teacher_are_moving_averages(weighted: bool) -> None:
    started = heads.Heads(normal(MANY, K, 5), normal(MANY, K, seed=1))
    first = started.weight.detach().clone()
    objective = temi.TEMI(
        started, temi.Config(weighted=weighted, beta=0.7, marginal_momentum=0.8, teacher_momentum=0.9)
    )
    one, other = normal(BATCH, 5, seed=2), normal(BATCH, 5, seed=3)
    with torch.no_grad():
        started.weight += 1
    objective.after_step()
    torch.testing.assert_close(objective.teacher.weight, first + 0.1)
    q_s, q_n = (started(part).detach().double().softmax(2).numpy() for part in (one, other))
    t_s, t_n = (objective.teacher(part).detach().double().softmax(2).numpy() for part in (one, other))
    marginal = (t_s.mean(0) + t_n.mean(0)) / 2
    pmi = np.log(((q_s * t_n) ** 0.7 / marginal).sum(2)) + np.log(((q_n * t_s) ** 0.7 / marginal).sum(2))
    weight = (t_s * t_n).sum(2).mean(1, keepdims=True) if weighted else 1.0
    loss = objective.loss(one, other)
    np.testing.assert_allclose(loss.detach().numpy(), -(weight * pmi / 2).mean(0), rtol=1e-4)
    torch.testing.assert_close(objective.loss(other, one), loss)
    objective.loss(one, one)
    assert objective.marginal is not None
    np.testing.assert_allclose(objective.marginal.numpy(), 0.8 * marginal + 0.2 * t_s.mean(0), rtol=1e-4)


@pytest.mark.reference
def test_scans_losses_are_the_papers_in_float64(seed: int) -> None:
    (one, p), (other, q) = answers(2 * seed), answers(2 * seed + 1)
    found = scan.clustering_loss(one, other, 5.0)
    by_itself = scan.self_labelling_loss(one, other, 0.6)
    for h in range(MANY):
        consistency = np.mean([np.log(p[b, h] @ q[b, h]) for b in range(BATCH)])
        mean = p[:, h].mean(0)
        assert found[h] == pytest.approx(-consistency + 5 * (mean * np.log(mean)).sum(), rel=1e-4)
        by_cluster: dict[int, list[float]] = {}
        for b in range(BATCH):
            if p[b, h].max() > 0.6:
                cluster = int(p[b, h].argmax())
                by_cluster.setdefault(cluster, []).append(-np.log(q[b, h, cluster]))
        assert by_itself[h] == pytest.approx(np.mean([np.mean(losses) for losses in by_cluster.values()]), rel=1e-4)
    assert scan.self_labelling_loss(one, other, 0.9999999).tolist() == [0] * MANY, "nobody is that confident"


@pytest.mark.reference
def test_the_swapped_loss_is_swavs_with_codes_by_the_papers_alternation(seed: int) -> None:
    scores = [normal(BATCH, MANY, K, seed=2 * seed + n) for n in range(2)]
    found = swav_head.swapped_loss(*scores, temperature=0.2, epsilon=0.3, iterations=3)
    for h in range(MANY):
        codes, logs = [], []
        for score in scores:
            exact = score[:, h].double().numpy()
            code = np.exp(exact / 0.3)
            for _ in range(3):
                code /= code.sum(0) * K
                code /= code.sum(1, keepdims=True) * BATCH
            codes.append(code * BATCH)
            soft = np.exp(exact / 0.2)
            logs.append(np.log(soft / soft.sum(1, keepdims=True)))
        expected = -(codes[1] * logs[0] + codes[0] * logs[1]).sum(1).mean() / 2
        assert found[h] == pytest.approx(expected, rel=1e-5)


def test_prototypes_of_swavs_head_keep_unit_length() -> None:
    started = heads.Heads(normal(MANY, K, 5), normal(MANY, K))
    objective = swav_head.SwAV(started, swav_head.Config(temperature=0.5))
    for _ in range(2):
        torch.testing.assert_close((0.5 * started.weight).norm(dim=2), torch.ones(MANY, K))
        assert not started.bias.any()
        with torch.no_grad():
            started.weight += 1
            started.bias += 1
        objective.after_step()


@pytest.mark.reference
def test_decs_formulas_are_the_papers_in_float64(seed: int) -> None:
    points, centroids = normal(BATCH, 3, seed=seed), normal(K, 3, seed=seed + 100)
    z, mu = points.double().numpy(), centroids.double().numpy()
    q = np.array([[1 / (1 + ((z[i] - mu[j]) ** 2).sum()) for j in range(K)] for i in range(BATCH)])
    q /= q.sum(1, keepdims=True)
    p = q**2 / q.sum(0)
    p /= p.sum(1, keepdims=True)
    found = dec.soft_assignments(points, centroids)
    np.testing.assert_allclose(found.numpy(), q, rtol=1e-5)
    np.testing.assert_allclose(dec.target(found).numpy(), p, rtol=1e-5)
    assert dec.divergence(dec.target(found), found) == pytest.approx((p * np.log(p / q)).sum() / BATCH, rel=1e-3)


def test_inputs_are_the_principal_axes_of_unit_features_at_mean_squared_length_one() -> None:
    points, _ = blobs()
    inputs = heads.Inputs.of(points)
    unit = points.double().numpy() / np.linalg.norm(points.double().numpy(), axis=1, keepdims=True)
    expected = PCA().fit_transform(unit)
    expected /= np.sqrt((expected**2).sum(1).mean())
    np.testing.assert_allclose(np.abs(inputs.points.numpy()), np.abs(expected), atol=1e-4)


def test_an_assigner_answers_on_features_as_its_head_does_on_inputs() -> None:
    points, _ = blobs()
    inputs = heads.Inputs.of(points)
    head = heads.Heads(normal(1, K, 16), normal(1, K))
    torch.testing.assert_close(inputs.assigner(head).logits(points), head(inputs.points)[:, 0], rtol=1e-4, atol=1e-5)
    rows = normal(3, 16)
    weight, bias = inputs.folded(rows)
    unit = torch.nn.functional.normalize(points, dim=1)
    torch.testing.assert_close(unit @ weight.T + bias, inputs.points @ rows.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_well_separated_groups_are_found_and_named_for_new_points(name: str) -> None:
    points, truth = blobs()
    found = fit(name, points[:180], 6)
    assert metrics.matched_accuracy(truth[180:], found.assign(points[180:]).numpy()) == 1
    torch.testing.assert_close(found.probabilities(points).sum(1), torch.ones(240))


@pytest.mark.parametrize("name", HEADS)
def test_a_fit_is_the_same_to_the_last_bit_and_leaves_the_global_generator_alone(name: str) -> None:
    points, _ = blobs(spread=0.5)
    before = torch.get_rng_state()
    one, again, other = (fit(name, points, 4, seed).state() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", HEADS)
def test_lengths_of_features_do_not_count(name: str) -> None:
    points, _ = blobs(spread=0.3)
    scaled = points * torch.linspace(0.5, 4, len(points))[:, None].exp2()
    assert torch.equal(fit(name, points, 6).assign(points), fit(name, scaled, 6).assign(points))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("points", [torch.ones(30, 4), torch.zeros(30, 4)], ids=["equal", "zero"])
def test_equal_points_share_a_cluster_and_the_others_stay_empty(name: str, points: Tensor) -> None:
    found = fit(name, points, 3)
    assert len(found.assign(points).unique()) == 1
    assert torch.isfinite(found.probabilities(points)).all()


@pytest.mark.parametrize("name", HEADS)
def test_copies_of_fewer_points_than_clusters_leave_clusters_empty(name: str) -> None:
    points = torch.eye(3, 6).repeat(20, 1)
    clusters = fit(name, points, 5).assign(points)
    assert len(clusters.unique()) <= 3
    assert torch.equal(clusters[:3].repeat(20), clusters), "copies have one cluster"


@pytest.mark.parametrize("name", HEADS)
def test_two_points_are_two_clusters(name: str) -> None:
    assert sorted(fit(name, normal(2, 6), 2).assign(normal(2, 6)).tolist()) == [0, 1]


class Planned(heads.Objective):
    """Makes some heads send all points to one cluster, and says that the last head is best."""

    def __init__(self, started: heads.Heads, collapsed: tuple[int, ...]) -> None:
        super().__init__(started)
        with torch.no_grad():
            for head in collapsed:
                started.weight[head] = 0
                started.bias[head, 0] = 1000

    def loss(self, points_BP: Tensor, neighbours_BP: Tensor) -> Tensor:
        return 0 * self.heads.bias.sum(1) - torch.arange(float(len(self.heads.bias)))


def search(*collapsed: tuple[int, ...]) -> tuple[heads.Heads, list[heads.Heads]]:
    """What a search among three heads finds of which these collapse in each attempt, and the heads of its attempts."""
    points, _ = blobs()
    attempts: list[heads.Heads] = []

    def objective(started: heads.Heads) -> heads.Objective:
        attempts.append(started)
        return Planned(started, collapsed[len(attempts) - 1])

    problem = Problem(points=Points(points), k=6, seed=0)
    options = heads.HeadConfig(heads=3, steps=1)
    return heads.search(heads.Inputs.of(points), problem, objective, options), attempts


def test_the_head_of_the_lowest_loss_is_taken_of_those_that_use_all_clusters() -> None:
    for collapsed, best in ([(), 2], [(2,), 1], [(1, 2), 0]):
        found, attempts = search(collapsed)
        assert len(attempts) == 1
        assert torch.equal(found.weight[0], attempts[0].weight[best])
        assert torch.equal(found.bias[0], attempts[0].bias[best])


def test_heads_that_all_collapse_start_again_from_another_seed_a_few_times() -> None:
    found, attempts = search((0, 1, 2), ())
    assert torch.equal(found.weight[0], attempts[1].weight[2])
    points = heads.Inputs.of(blobs()[0]).points
    found, attempts = search(*[(0, 1, 2)] * heads.ATTEMPTS)
    assert len(attempts) == heads.ATTEMPTS
    assert found.sizes(points).tolist() == [[240, 0, 0, 0, 0, 0]]


def test_each_attempt_begins_from_other_heads() -> None:
    points = Points(normal(240, 8))
    problem, inputs = Problem(points=points, k=6, seed=0), heads.Inputs.of(points.features)
    first, again, second = (heads.start(inputs, problem, heads.HeadConfig(heads=3), attempt) for attempt in (0, 0, 1))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, second.weight)
    begun: list[torch.Tensor] = []

    def collapsing(started: heads.Heads) -> heads.Objective:
        begun.append(started.weight.detach().clone())
        return Planned(started, (0, 1, 2))

    heads.search(inputs, problem, collapsing, heads.HeadConfig(heads=3, steps=1))
    assert torch.equal(begun[0], first.weight)
    assert torch.equal(begun[1], second.weight)


def test_a_head_starts_by_the_distances_from_its_clusters_means() -> None:
    points = normal(50, 5)
    clusters = torch.arange(50) % 3
    weight, bias = heads._nearest_mean(points, clusters, 3)
    exact = points.double().numpy()
    means = np.stack([exact[clusters == cluster].mean(0) for cluster in range(3)])
    squared = ((exact[:, None] - means) ** 2).sum(2)
    expected = -squared / squared[np.arange(50), clusters].mean()
    found = (points @ weight.T + bias).double().numpy()
    # What is the same for all clusters of a point, a softmax takes away.
    np.testing.assert_allclose(
        found - found.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), rtol=1e-4, atol=1e-5
    )


class Watched(heads.Objective):
    """Writes down how many points a step has, and how many threads."""

    def __init__(self, started: heads.Heads) -> None:
        super().__init__(started)
        self.seen: list[tuple[int, int]] = []

    def loss(self, points_BP: Tensor, neighbours_BP: Tensor) -> Tensor:
        self.seen.append((len(points_BP), torch.get_num_threads()))
        return self.heads(points_BP).sum((0, 2))


def test_a_step_has_sixteen_points_for_each_cluster_and_small_steps_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for batch, small, expected in ((8, 10_000, (16 * K, 1)), (100, 10_000, (100, 1)), (100, 100, (100, 2))):
            monkeypatch.setattr(heads, "_SMALL", small)
            objective = Watched(heads.Heads(normal(2, K, 3), normal(2, K)))
            options = heads.HeadConfig(batch=batch, steps=1)
            heads.train(normal(30, 3), torch.arange(30)[:, None], objective, options, seeding.generator(0))
            assert objective.seen == [expected]
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_eigenvectors_are_computed_once_for_all_fits_and_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(spectral, "embed", lambda *args, do=spectral.embed: made.append(args[1]) or do(*args))
    points = Points(torch.eye(3, 6).repeat(20, 1))  # fewer distinct points than clusters: heads start again
    for seed in range(2):
        for k in (4, 5):
            for name in ("spectral", "temi"):
                problem = Problem(points=points, k=k, seed=seed)
                algorithms.fit(name, problem, spectral.Config() if name == "spectral" else options(name))
    assert made == [4, 4, 5, 5], "of all points, and of the sample that heads start from"


def test_the_assigner_of_dec_is_saved_and_loaded_and_refused_where_it_does_not_fit() -> None:
    points, _ = blobs()
    found = fit("dec", points, 6)
    again = assigners.load("student_t", found.state(), k=6, dim=16)
    assert torch.equal(again.logits(points), found.logits(points))
    for k, dim in ((5, 16), (6, 15)):
        with pytest.raises(CheckpointError, match="expected the student_t of"):
            assigners.load("student_t", found.state(), k=k, dim=dim)
    with pytest.raises(CheckpointError):
        assigners.load("student_t", {}, k=6, dim=16)


def test_decs_probabilities_are_its_soft_assignments() -> None:
    points, _ = blobs()
    inputs = heads.Inputs.of(points)
    model = dec.train(inputs.points, 6, dec.Config(steps=20), seeding.derive(0))
    weight, bias = inputs.folded(model.weight.detach())
    found = assigners.StudentT(weight, bias, model.centroids.detach()).probabilities(points)
    torch.testing.assert_close(found, model.assignments(inputs.points), rtol=1e-4, atol=1e-5)
