"""LAME against a naive implementation in loops, hand-computed cases, and invariants."""

import math

import pytest
import torch
from torch import nn

from deepclust.adaptation.adapters.lame import LAME, affinity, assign, objective
from deepclust.adaptation.adapters.source import Source
from deepclust.adaptation.classifier import Classifier
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import CLASSES, classifier, same, seeded, state, stream

OPTIONS = [
    {},
    {"affinity": "knn", "neighbours": 2},
    {"affinity": "knn", "neighbours": 50},
    {"affinity": "rbf"},
    {"affinity": "rbf", "neighbours": 1},
    {"affinity": "linear"},
]
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


def stationary(logits, w):
    """Assignments by small steps along y ← softmax(log q + W y), one image after the other."""
    q = logits.softmax(dim=1).tolist()
    y = [list(row) for row in q]
    for _ in range(6000):
        for i in range(len(y)):
            pulls = [sum(w[i][j] * y[j][k] for j in range(len(y))) for k in range(CLASSES)]
            new = [q[i][k] * math.exp(pulls[k]) for k in range(CLASSES)]
            y[i] = [0.97 * old + 0.03 * value / sum(new) for old, value in zip(y[i], new, strict=True)]
    return torch.tensor(y, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_affinities_are_those_of_loops_over_pairs(options):
    features = torch.randn((9, 5), generator=seeded(3), dtype=torch.float64)
    kind, neighbours = options.get("affinity", "knn"), options.get("neighbours", 5)
    got = affinity(features, kind=kind, neighbours=neighbours)
    truth = torch.tensor(weights(features, kind, neighbours), dtype=torch.float64)
    torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_affinities_are_symmetric_to_the_bit_even_where_the_product_is_not(options, monkeypatch):
    product = torch.Tensor.__matmul__

    def skewed(left, right):  # as the kernels of some processors sum a product's two halves
        return product(left, right) + 1e-15 * torch.arange(len(left), dtype=left.dtype)

    monkeypatch.setattr(torch.Tensor, "__matmul__", skewed)
    features = torch.randn((9, 5), generator=seeded(3), dtype=torch.float64)
    got = affinity(features, kind=options.get("affinity", "knn"), neighbours=options.get("neighbours", 5))
    assert torch.equal(got, got.T)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_stream_is_a_fixed_point_of_the_published_step(options):
    model = classifier()
    adapter = LAME(model, **options)
    kind, neighbours = options.get("affinity", "knn"), options.get("neighbours", 5)
    moved = 0.0
    for images in stream(6):
        y = adapter(images).exp()
        features, logits = model.outputs(images)
        w = torch.tensor(weights(features.detach(), kind, neighbours), dtype=torch.float64)
        q = logits.detach().softmax(dim=1)
        for i in range(len(images)):
            pulled = [q[i, k] * math.exp((w[i] * y[:, k]).sum()) for k in range(CLASSES)]
            for k in range(CLASSES):
                assert abs(y[i, k] - pulled[k] / sum(pulled)) < 1e-7
        moved = max(moved, (y - q).abs().max().item())
    assert moved > 0.01


def test_predictions_are_those_of_a_slow_descent_from_the_models_predictions():
    model = classifier()
    for images, options in zip(stream(5), OPTIONS[1:], strict=True):
        features, logits = model.outputs(images[:6])
        w = weights(features.detach(), options["affinity"], options.get("neighbours", 5))
        truth = stationary(logits.detach(), w)
        torch.testing.assert_close(LAME(model, **options)(images[:6]).exp(), truth, atol=1e-6, rtol=0)


def test_two_images_agree_as_computed_by_hand():
    # y = softmax(log q + y) of both; with y = (y, 1 - y): y = σ(ln(q / (1 - q)) + 2 y - 1), the same for both.
    logits = torch.tensor([[0.5, 0.0], [0.5, 0.0]], dtype=torch.float64)
    pull = affinity(torch.ones(2, 3), kind="knn", neighbours=5)
    assert pull.tolist() == [[0, 1], [1, 0]]
    y = 0.5
    for _ in range(200):
        y = 1 / (1 + math.exp(-(0.5 + 2 * y - 1)))
    torch.testing.assert_close(assign(logits, pull).exp()[:, 0], torch.tensor([y, y], dtype=torch.float64))
    assert y > 1 / (1 + math.exp(-0.5)) + 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_objective_never_increases_and_rows_sum_to_one(kind, seed):
    features = torch.randn((30, 3), generator=seeded(seed), dtype=torch.float64)
    logits = torch.randn((30, 4), generator=seeded(seed + 100), dtype=torch.float64)
    pull = affinity(features, kind=kind, neighbours=5)
    log_q = logits.log_softmax(dim=1)
    before = objective(log_q, log_q, pull)
    start = before
    for limit in range(1, 60):
        log_y = assign(logits, pull, limit=limit)
        after = objective(log_y, log_q, pull)
        assert after <= before + 1e-9
        torch.testing.assert_close(log_y.exp().sum(dim=1), torch.ones(30, dtype=torch.float64))
        before = after
    assert after < start - 0.1


def test_without_the_damping_the_objective_would_increase():
    # Two groups that pull each other and not themselves: the published step swaps them for ever.
    pull = torch.zeros(8, 8, dtype=torch.float64)
    pull[:4, 4:] = pull[4:, :4] = 1
    logits = torch.tensor([[0.1, 0.0]] * 4 + [[0.0, 0.1]] * 4, dtype=torch.float64)
    log_q = logits.log_softmax(dim=1)
    log_y = log_q
    energies = []
    for _ in range(20):
        log_y = (log_q + pull @ log_y.exp()).log_softmax(dim=1)
        energies.append(objective(log_y, log_q, pull))
    assert max(energies) > objective(log_q, log_q, pull)
    damped = assign(logits, pull)
    assert objective(damped, log_q, pull) < objective(log_q, log_q, pull)


def test_with_affinity_zero_it_returns_the_sources_softmax():
    logits = torch.randn((7, 4), generator=seeded(0), dtype=torch.float64)
    got = assign(logits, torch.zeros(7, 7, dtype=torch.float64)).exp()
    torch.testing.assert_close(got, logits.softmax(dim=1), atol=0, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_is_predicted_as_the_source_does(kind):
    image = stream(1)[0][:1]
    truth = Source(classifier())(image)
    torch.testing.assert_close(LAME(classifier(), affinity=kind)(image).exp(), truth.softmax(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_and_zero_features_give_finite_predictions(kind):
    for features in (torch.ones(4, 3), torch.zeros(4, 3)):
        pull = affinity(features, kind=kind, neighbours=2)
        assert torch.isfinite(pull).all()
        assert torch.isfinite(assign(torch.randn((4, 3), generator=seeded(0)), pull)).all()


def test_the_model_stays_in_eval_mode_and_no_batch_depends_on_another():
    adapter = LAME(classifier().train())
    before = state(adapter.model)
    first, second = stream(2)
    truth = LAME(classifier())(second)
    adapter(first)
    assert torch.equal(adapter(second), truth)
    assert same(state(adapter.model), before)
    assert not any(module.training for module in adapter.model.modules())
    assert not any(parameter.requires_grad for parameter in adapter.model.parameters())


def test_the_order_of_a_batch_does_not_matter():
    images = stream(1)[0]
    order = torch.randperm(len(images), generator=seeded(0))
    for kind in KINDS:
        straight, shuffled = (LAME(classifier(), affinity=kind)(batch) for batch in (images, images[order]))
        torch.testing.assert_close(shuffled, straight[order], atol=1e-6, rtol=0)


def test_correlated_labels_are_predicted_better_than_by_the_source():
    # Two far classes in the features, a batch of one of them, and a head that is right six times in ten.
    generator = seeded(0)
    features = torch.tensor([[4.0, 0.0]]) + torch.randn((40, 2), generator=generator)
    logits = torch.tensor([[0.25, 0.0]]) + torch.randn((40, 2), generator=generator)
    wrong = (logits.argmax(dim=1) != 0).float().mean()
    after = assign(logits, affinity(features, kind="knn", neighbours=5)).argmax(dim=1)
    assert wrong > 0.3
    assert (after != 0).float().mean() < wrong / 2


def test_knn_gains_from_correlated_labels_and_harms_others_less_than_rbf():
    generator = seeded(0)
    means = torch.randn((10, 32), generator=generator)
    errors = {}
    for time in range(20):
        for correlated in (False, True):
            labels = torch.randint(0, 2 if correlated else 10, (64,), generator=generator) + correlated * (time % 9)
            features = (means[labels] + 1.5 * torch.randn((64, 32), generator=generator)).relu()
            logits = 0.15 * features @ means.T
            predictions = {"source": logits, **{kind: lame(logits, features, kind) for kind in ("knn", "rbf")}}
            for kind, values in predictions.items():
                wrong = (values.argmax(dim=1) != labels).float().mean().item()
                errors[kind, correlated] = errors.get((kind, correlated), 0) + wrong / 20
    assert errors["knn", True] < errors["source", True] / 3
    assert errors["source", False] < errors["knn", False] < errors["rbf", False] / 2


def lame(logits, features, kind):
    return assign(logits, affinity(features, kind=kind, neighbours=5))


def test_float32_models_get_float32_logits_and_the_global_generator_is_untouched():
    model = classifier().float()
    before = torch.get_rng_state()
    adapter = LAME(model)
    assert adapter(stream(1)[0].float()).dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


def test_options_and_models_that_do_not_fit_are_errors():
    with pytest.raises(AdaptationError, match="affinity to be one of knn, rbf, linear; got 'cosine'"):
        LAME(classifier(), affinity="cosine")
    with pytest.raises(AdaptationError, match="neighbours of at least 1, got 0"):
        LAME(classifier(), neighbours=0)
    with pytest.raises(AdaptationError, match="'linear' has no neighbours, got 5"):
        LAME(classifier(), affinity="linear", neighbours=5)
    with pytest.raises(AdaptationError, match=r"expected a classifier with a linear head \(nn.Linear\)"):
        LAME(nn.Sequential(nn.Flatten(), nn.LayerNorm(12)))


def test_any_model_with_a_linear_head_will_do():
    model = classifier()
    plain = nn.Sequential(model.featurizer, model.head)
    images = stream(1)[0]
    assert isinstance(model, Classifier)
    assert torch.equal(LAME(plain)(images), LAME(model)(images))
