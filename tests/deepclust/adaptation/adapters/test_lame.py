"""LAME against a naive implementation in loops, hand-computed cases, and invariants."""

import itertools
import math

import pytest
import torch

from deepclust.adaptation import Source
from deepclust.adaptation.adapters.lame import LAME, Config, affinity, assign
from deepclust.errors import ConfigError
from tests.deepclust.adaptation.nets import CLASSES, classifier, seeded, stream

KINDS = ["knn", "rbf", "linear"]


def weights(features, kind, neighbours):
    """Affinities by loops over pairs."""
    rows = [[value / math.sqrt(sum(other**2 for other in row)) for value in row] for row in features.tolist()]
    count = len(rows)
    distances = [[math.dist(left, right) for right in rows] for left in rows]
    others = [[j for j in range(count) if j != i] for i in range(count)]
    nearest = [sorted(others[i], key=lambda j: distances[i][j])[:neighbours] for i in range(count)]
    if kind == "rbf":
        sigma = sum(distances[i][nearest[i][-1]] for i in range(count)) / count

    def weight(i, j):
        if kind == "knn":
            return ((j in nearest[i]) + (i in nearest[j])) / 2
        if kind == "rbf":
            return math.exp(-(distances[i][j] ** 2) / (2 * sigma**2))
        return sum(left * right for left, right in zip(rows[i], rows[j], strict=True))

    return [[0.0 if i == j else weight(i, j) for j in range(count)] for i in range(count)]


def objective(log_y, log_q, pull):
    """Σ_i KL(y_i ‖ q_i) − ½ Σ_ij w_ij y_i·y_j."""
    y = log_y.exp()
    return ((y * (log_y - log_q)).sum() - (y * (pull @ y)).sum() / 2).item()


def stationary(logits, w):
    """Assignments by small steps along y ← softmax(log q + W y), one image after the other."""
    q = logits.softmax(dim=1).tolist()
    y = [list(row) for row in q]
    for _ in range(1500):
        for i in range(len(y)):
            pulls = [sum(w[i][j] * y[j][k] for j in range(len(y))) for k in range(CLASSES)]
            new = [q[i][k] * math.exp(pulls[k]) for k in range(CLASSES)]
            y[i] = [0.97 * old + 0.03 * value / sum(new) for old, value in zip(y[i], new, strict=True)]
    return torch.tensor(y, dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{}, {"neighbours": 50}, {"affinity": "rbf", "neighbours": 1}, {"affinity": "linear"}], ids=str
)
def test_affinities_are_those_of_loops_over_pairs_and_predictions_those_of_a_slow_descent_from_the_models(options):
    model, images = classifier(), stream(3)[2][:7]
    features, logits = (value.detach() for value in model.outputs(images))
    kind, neighbours = options.get("affinity", "knn"), options.get("neighbours", 5)
    w = weights(features, kind, neighbours)
    got = affinity(features, kind=kind, neighbours=neighbours)
    torch.testing.assert_close(got, torch.tensor(w, dtype=torch.float64))
    predicted = LAME(model, Config(**options))(images).exp()
    torch.testing.assert_close(predicted, stationary(logits, w), atol=1e-6, rtol=0)
    assert (predicted - logits.softmax(dim=1)).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_affinities_are_symmetric_to_the_bit_even_where_the_product_is_not(kind, monkeypatch):
    product = torch.Tensor.__matmul__

    def skewed(left, right):  # as the kernels of some processors sum a product's two halves
        return product(left, right) + 1e-15 * torch.arange(len(left), dtype=left.dtype)

    monkeypatch.setattr(torch.Tensor, "__matmul__", skewed)
    got = affinity(torch.randn((9, 5), generator=seeded(3), dtype=torch.float64), kind=kind, neighbours=5)
    assert torch.equal(got, got.T)


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_never_increases_and_rows_sum_to_one(kind):
    features = torch.randn((30, 3), generator=seeded(1), dtype=torch.float64)
    logits = torch.randn((30, 4), generator=seeded(101), dtype=torch.float64)
    pull, log_q = affinity(features, kind=kind, neighbours=5), logits.log_softmax(dim=1)
    found = [log_q, *(assign(logits, pull, limit=limit) for limit in range(1, 40))]
    energies = [objective(log_y, log_q, pull) for log_y in found]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(energies))
    assert energies[-1] < energies[0] - 0.1
    torch.testing.assert_close(found[-1].exp().sum(dim=1), torch.ones(30, dtype=torch.float64))


def test_without_the_damping_the_objective_would_increase():
    # Two groups that pull each other and not themselves: the published step swaps them for ever.
    pull = torch.zeros(8, 8, dtype=torch.float64)
    pull[:4, 4:] = pull[4:, :4] = 1
    logits = torch.tensor([[0.1, 0.0]] * 4 + [[0.0, 0.1]] * 4, dtype=torch.float64)
    log_y = log_q = logits.log_softmax(dim=1)
    energies = []
    for _ in range(20):
        log_y = (log_q + pull @ log_y.exp()).log_softmax(dim=1)
        energies.append(objective(log_y, log_q, pull))
    assert max(energies) > objective(log_q, log_q, pull) > objective(assign(logits, pull), log_q, pull)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_one_of_equal_or_zero_features_and_in_any_order(kind):
    adapter, images = LAME(classifier(), Config(affinity=kind)), stream(1)[0]
    torch.testing.assert_close(adapter(images[:1]).exp(), Source(classifier())(images[:1]).softmax(dim=1))
    order = torch.randperm(len(images), generator=seeded(0))
    torch.testing.assert_close(adapter(images[order]), adapter(images)[order], atol=1e-6, rtol=0)
    for features in (torch.ones(4, 3), torch.zeros(4, 3)):
        pull = affinity(features, kind=kind, neighbours=2)
        assert torch.isfinite(assign(torch.randn((4, 3), generator=seeded(0)), pull)).all()


def test_knn_gains_from_correlated_labels_and_harms_others_less_than_rbf():
    generator = seeded(0)
    means = torch.randn((10, 32), generator=generator)
    errors = {}
    for time in range(20):
        for correlated in (False, True):
            labels = torch.randint(0, 2 if correlated else 10, (64,), generator=generator) + correlated * (time % 9)
            features = (means[labels] + 1.5 * torch.randn((64, 32), generator=generator)).relu()
            logits = 0.15 * features @ means.T
            for kind in ("source", "knn", "rbf"):
                pull = None if kind == "source" else affinity(features, kind=kind, neighbours=5)
                values = logits if pull is None else assign(logits, pull)
                wrong = (values.argmax(dim=1) != labels).float().mean().item()
                errors[kind, correlated] = errors.get((kind, correlated), 0) + wrong / 20
    assert errors["knn", True] < errors["source", True] / 3
    assert errors["source", False] < errors["knn", False] < errors["rbf", False] / 2


def test_linear_affinities_have_no_neighbours():
    with pytest.raises(ConfigError, match="'linear' has no neighbours, got 5"):
        Config(affinity="linear", neighbours=5)
