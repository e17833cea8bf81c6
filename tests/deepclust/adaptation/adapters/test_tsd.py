"""TSD against a naive float64 implementation of its formulas, hand-computed cases, and invariants."""

import math

import pytest
import torch
from torch import nn

from deepclust.adaptation.adapters.bn import BN
from deepclust.adaptation.adapters.tsd import TSD, distillation_loss, local_loss
from deepclust.adaptation.bank import Bank, members, prototypes, remember
from deepclust.adaptation.classifier import Classifier
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import CLASSES, MODULES, ROLES, classifier, same, seeded, state, stream


class Reference:
    """TSD in loops over samples, classes and members; Adam by its own formula."""

    def __init__(self, model, *, rate, parameters, filter_k, neighbours, local_weight, temperature):
        values = model.state_dict()
        self.p = {name: values[module].clone() for name, module in MODULES.items()}
        self.learning = ROLES[parameters]
        self.rate, self.filter_k, self.neighbours = rate, filter_k, neighbours
        self.weight, self.temperature = local_weight, temperature
        self.moments = {
            name: (torch.zeros_like(self.p[name]), torch.zeros_like(self.p[name])) for name in self.learning
        }
        self.time = 0
        self.filtered = 0
        self.members = [self.member(row, self.p["w"] @ row + self.p["b"]) for row in self.p["w"]]

    @staticmethod
    def member(feature, logits):
        exponentials = [math.exp(value) for value in logits.tolist()]
        score = [value / sum(exponentials) for value in exponentials]
        entropy = -sum(value * math.log(value) for value in score)
        return {"z": feature, "s": score, "label": score.index(max(score)), "entropy": entropy}

    def forward(self, images):
        p = self.p
        hidden = images.flatten(1) @ p["w1"].T + p["b1"]
        mean = hidden.sum(dim=0) / len(hidden)
        variance = ((hidden - mean) ** 2).sum(dim=0) / len(hidden)
        hidden = (hidden - mean) / torch.sqrt(variance + 1e-5) * p["scale"] + p["shift"]
        features = hidden.clamp(min=0) @ p["w2"].T + p["b2"]
        return features, features @ p["w"].T + p["b"]

    def __call__(self, images):
        for name in self.learning:
            self.p[name] = self.p[name].detach().requires_grad_(True)
        features, logits = self.forward(images)
        current = [self.member(z.detach(), row.detach()) for z, row in zip(features, logits, strict=True)]
        self.members += current
        if self.filter_k is not None:
            kept = []
            for k in range(CLASSES):
                of_class = [member for member in self.members if member["label"] == k]
                # With -1 the slice leaves out the last, the least certain.
                kept += sorted(of_class, key=lambda member: member["entropy"])[: self.filter_k]
            self.members = [member for member in self.members if any(member is other for other in kept)]
        loss = self.distillation(features, current) + self.weight * self.local(features, logits, current)
        gradients = torch.autograd.grad(loss, [self.p[name] for name in self.learning], allow_unused=True)
        self.time += 1
        for name, gradient in zip(self.learning, gradients, strict=True):
            if gradient is None:
                continue
            first, second = self.moments[name]
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            self.moments[name] = (first, second)
            corrected = first / (1 - 0.9**self.time), second / (1 - 0.999**self.time)
            self.p[name] = (self.p[name] - self.rate * corrected[0] / (corrected[1].sqrt() + 1e-8)).detach()
        return logits.detach()

    @staticmethod
    def cosine(left, right):
        return (left * right).sum() / ((left**2).sum().sqrt() * (right**2).sum().sqrt())

    def distillation(self, features, current):
        centres = {}
        for member in self.members:
            unit = member["z"] / (member["z"] ** 2).sum().sqrt()
            centres[member["label"]] = centres.get(member["label"], 0) + unit
        losses = []
        for z, sample in zip(features, current, strict=True):
            weights = {k: torch.exp(self.cosine(z, centre) / self.temperature) for k, centre in centres.items()}
            q = {k: weight / sum(weights.values()) for k, weight in weights.items()}
            if max(q, key=lambda k: q[k].item()) != sample["label"]:
                self.filtered += 1
                continue
            mass = sum(sample["s"][k] for k in centres)
            target = {k: sample["s"][k] / mass for k in centres}
            losses.append(sum(target[k] * (math.log(target[k]) - torch.log(q[k])) for k in centres))
        return sum(losses) / len(losses) if losses else features.sum() * 0

    def local(self, features, logits, current):
        losses = []
        for z, row, sample in zip(features, logits, current, strict=True):
            score = torch.exp(row) / torch.exp(row).sum()
            others = [member for member in self.members if member is not sample]
            others.sort(key=lambda member: -self.cosine(z.detach(), member["z"]).item())
            nearest = others[: self.neighbours]
            pulls = [
                self.cosine(z.detach(), member["z"]) * ((score - torch.tensor(member["s"], dtype=z.dtype)) ** 2).sum()
                for member in nearest
            ]
            losses.append(sum(pulls) / len(pulls))
        return sum(losses) / len(losses)


OPTIONS = [
    {"parameters": "all"},
    {"parameters": "all", "filter_k": None},
    {"parameters": "affine", "rate": 1e-2, "filter_k": 2},
    {"parameters": "body", "temperature": 0.1, "local_weight": 0.0},
    {"parameters": "head", "neighbours": 5, "local_weight": 2.0},
    {"parameters": "all", "filter_k": 1, "neighbours": 50},
]


@pytest.mark.parametrize("seed", [3, 2], ids=["a class without members", "all classes"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_stream_is_that_of_the_reference_predictions_bank_and_weights(options, seed):
    options = {
        "rate": 1e-3,
        "parameters": "all",
        "filter_k": 5,
        "neighbours": 3,
        "local_weight": 0.3,
        "temperature": 1.0,
    } | options
    model = classifier(seed)
    adapter, reference = TSD(model, **options), Reference(model, **options)
    for images in stream(7):
        torch.testing.assert_close(adapter(images), reference(images), rtol=0, atol=1e-9)
        assert adapter.bank.labels.tolist() == [member["label"] for member in reference.members]
        for name, key in (("features", "z"), ("scores", "s"), ("entropies", "entropy")):
            rows = [torch.as_tensor(member[key], dtype=torch.float64) for member in reference.members]
            torch.testing.assert_close(getattr(adapter.bank, name), torch.stack(rows), rtol=0, atol=1e-9)
        weights = adapter.model.state_dict()
        for name, module in MODULES.items():
            torch.testing.assert_close(weights[module], reference.p[name].detach(), rtol=0, atol=1e-9)
    for name, module in MODULES.items():
        learnt = not torch.equal(weights[module], model.state_dict()[module])
        # What the first bias adds, batch statistics take away again: nothing but rounding reaches it.
        assert learnt == (name in options_learn(options)) or name == "b1"
    assert 0 < reference.filtered < 7 * 9, "the stream has to exercise the consistency filter"
    assert (len(adapter.bank.labels.unique()) == CLASSES) == (seed == 2)


def options_learn(options):
    """The parameters that the loss reaches: the head's only through the local term."""
    names = ROLES[options["parameters"]]
    return [name for name in names if options["local_weight"] or name not in ROLES["head"]]


def bank_of(features, logits):
    return members(torch.tensor(features, dtype=torch.float64), torch.tensor(logits, dtype=torch.float64))


def test_the_bank_starts_with_the_heads_rows_and_their_own_predictions():
    model = classifier()
    bank = TSD(model).bank
    weight, bias = model.head.weight.detach(), model.head.bias.detach()
    assert torch.equal(bank.features, weight)
    torch.testing.assert_close(bank.scores, (weight @ weight.T + bias).softmax(dim=1))
    assert torch.equal(bank.labels, bank.scores.argmax(dim=1))
    weight_after = TSD(model)
    weight_after(stream(1)[0])
    assert torch.equal(weight_after.bank.features[: len(weight)], weight)


def test_the_lowest_entropies_of_each_class_stay_in_order_and_older_members_win_ties():
    log = math.log
    bank = bank_of([[1.0], [2.0], [3.0]], [[log(9), 0], [log(3), 0], [0, log(2)]])
    batch = bank_of([[4.0], [5.0], [6.0]], [[log(4), 0], [log(3), 0], [0, log(8)]])
    kept, rows = remember(bank, batch, filter_k=2)
    # Class 0 has odds 9, 3, 4, 3: 9 and 4 stay. Class 1 has 2 and 8: both stay.
    assert kept.features.squeeze(1).tolist() == [1, 3, 4, 6]
    assert kept.labels.tolist() == [0, 1, 0, 1]
    assert rows.tolist() == [-1, -1, 0, 2]
    three, rows = remember(bank, batch, filter_k=3)
    assert three.features.squeeze(1).tolist() == [1, 2, 3, 4, 6]
    everything, rows = remember(bank, batch, filter_k=None)
    assert everything.features.squeeze(1).tolist() == [1, 2, 3, 4, 5, 6]
    assert rows.tolist() == [-1, -1, -1, 0, 1, 2]


def test_prototypes_are_sums_of_unit_features_and_classes_without_members_have_none():
    bank = bank_of([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]], [[1, 0, 0], [2, 0, 0], [0, 0, 1]])
    sums, classes = prototypes(bank)
    assert classes.tolist() == [0, 2]
    torch.testing.assert_close(sums, torch.tensor([[0.6, 1.8], [1.0, 0.0]], dtype=torch.float64))


def test_distillation_is_the_kl_divergence_of_samples_that_head_and_prototypes_agree_on():
    bank = bank_of([[1.0, 0.0], [0.0, 1.0]], [[5, 0], [0, 5]])
    features = torch.tensor([[2.0, 0.0], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64, requires_grad=True)
    loss = distillation_loss(features, scores, bank, temperature=0.5)
    q = math.exp(2) / (math.exp(2) + 1)
    assert loss.item() == pytest.approx(0.8 * math.log(0.8 / q) + 0.2 * math.log(0.2 / (1 - q)))
    loss.backward()
    assert scores.grad is None, "the target is a constant"
    assert features.grad[0].abs().sum() > 0
    assert not features.grad[1].any(), "the second sample's head says 1, its prototypes say 0"


def test_distillation_is_zero_without_a_sample_that_agrees():
    bank = bank_of([[1.0, 0.0], [0.0, 1.0]], [[5, 0], [0, 5]])
    features = torch.tensor([[0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    loss = distillation_loss(features, torch.tensor([[0.9, 0.1]], dtype=torch.float64), bank, temperature=1.0)
    loss.backward()
    assert loss.item() == 0
    assert not features.grad.any()


def test_the_local_term_weighs_squared_distances_to_the_nearest_others_by_cosine():
    bank = Bank(
        torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64),
        torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.0, 1.0]], dtype=torch.float64),
        torch.tensor([0, 0, 1, 1]),
        torch.zeros(4, dtype=torch.float64),
    )
    features = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    scores = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    far = torch.tensor([-1, -1, -1, -1])
    half = math.sqrt(0.5)
    nearest = local_loss(features, scores, bank, far, neighbours=2)
    assert nearest.item() == pytest.approx((1 * 0 + half * 2 * 0.4**2) / 2)
    itself = torch.tensor([0, -1, -1, -1])
    without = local_loss(features, scores, bank, itself, neighbours=2)
    assert without.item() == pytest.approx((half * 2 * 0.4**2 + 0 * 2 * 0.7**2) / 2)
    fewer = local_loss(features, scores, bank, itself, neighbours=9)
    assert fewer.item() == pytest.approx((half * 2 * 0.4**2 + 0 - 1 * 2 * 0.9**2) / 3)


def test_a_sample_whose_only_neighbour_is_itself_feels_no_pull():
    bank = bank_of([[1.0, 0.0]], [[3.0, 0.0]])
    loss = local_loss(bank.features, bank.scores, bank, torch.tensor([0]), neighbours=3)
    assert loss.item() == 0


def test_the_local_term_pulls_predictions_towards_the_neighbours():
    bank = bank_of([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1]], [[2, 0], [2, 0], [2, 0]])
    logits = torch.tensor([[0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    features = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    local_loss(features, logits.softmax(dim=1), bank, torch.tensor([-1, -1, -1]), neighbours=3).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]


def test_the_prediction_is_from_before_the_step():
    first, second = stream(2)
    adapter = TSD(classifier(), rate=0.1)
    assert torch.equal(adapter(first), BN(classifier())(first))
    assert not torch.allclose(adapter(second), BN(classifier())(second))


def test_the_bank_stays_bounded_along_a_stream():
    adapter = TSD(classifier(), filter_k=4)
    for images in stream(40):
        adapter(images)
        assert len(adapter.bank.labels) <= 4 * CLASSES
        assert torch.bincount(adapter.bank.labels).max() <= 4
    assert not adapter.bank.features.requires_grad


def test_a_model_with_layer_norm_alone_adapts_single_images():
    featurizer = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5)).double()
    model = Classifier(featurizer, nn.Linear(5, 3).double())
    adapter = TSD(model, parameters="affine", rate=0.1)
    for images in stream(5, batch_size=1):
        adapter(images)
    changed = [
        name for name, value in adapter.model.state_dict().items() if not torch.equal(value, model.state_dict()[name])
    ]
    assert changed == ["featurizer.2.weight", "featurizer.2.bias"]


def test_a_featurizer_without_parameters_is_an_error():
    model = Classifier(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(AdaptationError, match=r"this featurizer has no parameters; use the source adapter"):
        TSD(model)
    without_norm = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), nn.Linear(4, 3))
    with pytest.raises(AdaptationError, match=r"parameters 'affine': this model has none to adapt"):
        TSD(without_norm, parameters="affine")
    with pytest.raises(AdaptationError, match=r"no gradient reaches the head"):
        TSD(classifier(), parameters="head", local_weight=0)


@pytest.mark.parametrize(
    "options", [{"filter_k": 0}, {"rate": 0}, {"temperature": 0}, {"neighbours": 0}, {"local_weight": -1}], ids=str
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(AdaptationError, match=f"{next(iter(options))}.*got"):
        TSD(classifier(), **options)


@pytest.mark.parametrize("parameters", ROLES)
def test_only_the_chosen_parameters_ask_for_gradients(parameters):
    model = TSD(classifier(), parameters=parameters).model
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert asking == {MODULES[name] for name in ROLES[parameters]}


class Logarithm(nn.Module):
    """Positive images to finite features, negative ones to NaN."""

    def forward(self, images):
        return images.flatten(1).log()


def test_a_loss_that_is_not_finite_stops_before_the_step():
    featurizer = nn.Sequential(Logarithm(), nn.Linear(12, 5)).double()
    adapter = TSD(Classifier(featurizer, nn.Linear(5, 3).double()))
    images = stream(1)[0]
    adapter(images.abs())
    before, bank = state(adapter.model), adapter.bank
    with pytest.raises(AdaptationError, match="tsd's loss is nan"):
        adapter(images)
    assert same(state(adapter.model), before)
    assert all(torch.equal(left, right) for left, right in zip(adapter.bank, bank, strict=True))


def test_float32_follows_float64():
    model = classifier()
    double, single = TSD(model, filter_k=5), TSD(classifier().float(), filter_k=5)
    for images in stream(6):
        torch.testing.assert_close(single(images.float()).double(), double(images), rtol=1e-3, atol=1e-3)


def test_random_streams_never_break_the_banks_bookkeeping():
    generator = seeded(3)
    bank = members(torch.randn(3, 2, generator=generator), torch.randn(3, 5, generator=generator))
    for _ in range(20):
        batch = members(torch.randn(8, 2, generator=generator), torch.randn(8, 5, generator=generator))
        bank, rows = remember(bank, batch, filter_k=3)
        for member, row in enumerate(rows.tolist()):
            if row >= 0:
                assert torch.equal(bank.features[member], batch.features[row])
        assert torch.bincount(bank.labels, minlength=5).max() <= 3
