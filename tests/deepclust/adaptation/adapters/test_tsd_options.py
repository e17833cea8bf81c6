"""Where the authors' code deviates from the paper: each option, and all of them, against loops in float64."""

import io
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust import seeding
from deepclust.adaptation.adapters.tsd import ORIGINAL, TSD, Variant, distillation_loss, local_loss
from deepclust.adaptation.bank import DROP_LAST, Bank, members, prototypes, remember
from deepclust.adaptation.classifier import Classifier
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.adapters.test_tsd import MODULES
from tests.deepclust.adaptation.adapters.test_tsd import Reference as OfPaper
from tests.deepclust.adaptation.nets import CLASSES, HIDDEN, classifier, same, seeded, state, stream

DROPOUT = 0.3
CODE = {
    "normalise": "l1",
    "target": "softmax_of_prediction",
    "divergence": "reverse",
    "consistency_filter": False,
    "empty_classes": "zero",
    "local_weight": 0.0,
    "local_compares": "logits",
    "local_itself": True,
    "local_repels": True,
    "train_mode": True,
}
FREE = {"rate": 1e-3, "parameters": "all", "filter_k": 5, "neighbours": 3, "temperature": 1.0}


def dropping_classifier(seed=0):
    """The tests' net with dropout behind its ReLU; the names of its parameters stay."""
    model = classifier(seed)
    model.featurizer[3] = nn.Sequential(nn.ReLU(), nn.Dropout(DROPOUT))
    return model


def lengths(norm):
    return {"l1": lambda row: row.abs().sum(), "l2": lambda row: (row**2).sum().sqrt()}[norm]


def exponentials(values):
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


class Reference(OfPaper):
    """Each deviation of the code in loops over samples, classes and members."""

    def __init__(self, model, *, variant, **free):
        super().__init__(model, local_weight=variant.get("local_weight", 0.1), **free)
        self.variant = asdict(Variant()) | variant

    def forward(self, images):
        if not self.variant["train_mode"]:
            return super().forward(images)
        p = self.p
        hidden = images.flatten(1) @ p["w1"].T + p["b1"]
        centred = hidden - hidden.mean(dim=0)
        hidden = centred / torch.sqrt((centred**2).mean(dim=0) + 1e-5) * p["scale"] + p["shift"]
        # Whoever runs the reference seeds the global generator.
        mask = F.dropout(torch.ones(len(images), HIDDEN, dtype=torch.float64), DROPOUT)
        features = hidden.clamp(min=0) * mask @ p["w2"].T + p["b2"]
        return features, features @ p["w"].T + p["b"]

    def similarity(self, left, right):
        length = lengths(self.variant["normalise"])
        return (left * right).sum() / length(left) / length(right) if right.any() else (left * right).sum()

    def distillation(self, features, current):
        variant, l2 = self.variant, lengths("l2")
        nothing = torch.zeros_like(features[0].detach())
        centres = dict.fromkeys(range(CLASSES), nothing) if variant["empty_classes"] == "zero" else {}
        for member in self.members:
            centres[member["label"]] = centres.get(member["label"], nothing) + member["z"] / l2(member["z"])
        losses, count = [], 0
        for z, sample in zip(features, current, strict=True):
            weights = {k: torch.exp(self.similarity(z, centre) / self.temperature) for k, centre in centres.items()}
            q = {k: weight / sum(weights.values()) for k, weight in weights.items()}
            if variant["consistency_filter"] and max(q, key=lambda k: q[k].item()) != sample["label"]:
                self.filtered += 1
                continue
            count += 1
            target = exponentials(sample["s"]) if variant["target"] == "softmax_of_prediction" else sample["s"]
            t = {k: target[k] / sum(target[j] for j in centres) for k in centres}
            for k in centres:
                forward = t[k] * (math.log(t[k]) - torch.log(q[k]))
                reverse = q[k] * (torch.log(q[k]) - math.log(t[k]))
                losses.append(forward if variant["divergence"] == "forward" else reverse)
        return sum(losses) / count if count else features.sum() * 0

    def local(self, features, logits, current):
        variant = self.variant
        losses = []
        for z, row, sample in zip(features, logits, current, strict=True):
            value = row if variant["local_compares"] == "logits" else torch.exp(row) / torch.exp(row).sum()
            others = [member for member in self.members if variant["local_itself"] or member is not sample]
            others.sort(key=lambda member: -self.similarity(z.detach(), member["z"]).item())
            pulls = [
                self.similarity(z.detach(), member["z"])
                * ((value - torch.tensor(member["s"], dtype=z.dtype)) ** 2).sum()
                for member in others[: self.neighbours]
            ]
            losses.append(sum(pulls) / len(pulls) * (-1 if variant["local_repels"] else 1))
        return sum(losses) / len(losses)


def check_same(adapter, reference):
    assert adapter.bank.labels.tolist() == [member["label"] for member in reference.members]
    for name, key in (("features", "z"), ("scores", "s"), ("entropies", "entropy")):
        rows = [torch.as_tensor(member[key], dtype=torch.float64) for member in reference.members]
        torch.testing.assert_close(getattr(adapter.bank, name), torch.stack(rows), rtol=0, atol=1e-9)
    weights = adapter.model.state_dict()
    for name, module in MODULES.items():
        torch.testing.assert_close(weights[module], reference.p[name].detach(), rtol=0, atol=1e-9)


def run_both(adapter, reference, batches=6, seed=0):
    for index, images in enumerate(stream(batches)):
        with seeding.seeded("tsd", seed, index):
            expected = reference(images)
        torch.testing.assert_close(adapter(images), expected, rtol=0, atol=1e-9)
        check_same(adapter, reference)


@pytest.mark.parametrize("free", [{}, {"filter_k": DROP_LAST}, {"temperature": 0.2, "parameters": "affine"}], ids=str)
@pytest.mark.parametrize("seed", [3, 2], ids=["a class without members", "all classes"])
def test_compat_is_the_reference_of_the_codes_semantics(free, seed):
    model = dropping_classifier(seed)
    adapter = TSD(model, compat="original", **FREE | free)
    run_both(adapter, Reference(model, variant=CODE, **FREE | free))
    assert not same(state(adapter.model), state(TSD(model).model)), "nothing was learnt"


@pytest.mark.parametrize(
    "options",
    [{name: value} for name, value in CODE.items() if name != "local_weight"]
    + [{"local_weight": 0.0}, {"filter_k": DROP_LAST}, {"train_mode": True, "seed": 5}],
    ids=str,
)
def test_each_option_alone_is_the_reference_with_that_deviation_alone(options):
    model = dropping_classifier(3)
    options = {"local_weight": 0.3} | options
    variant = {name: value for name, value in options.items() if name in CODE}
    reference = Reference(model, variant=variant, **FREE | {k: v for k, v in options.items() if k in FREE})
    adapter = TSD(model, **FREE | options)
    run_both(adapter, reference, batches=5, seed=options.get("seed", 0))
    paper = TSD(model, **FREE, local_weight=0.3)
    for images in stream(5):
        paper(images)
    assert not same(state(paper.model), state(adapter.model)), "the option has to matter on this stream"


def test_the_codes_local_term_where_it_is_on_is_the_references():
    model = dropping_classifier(2)
    options = asdict(ORIGINAL) | {"local_weight": 0.3}
    run_both(TSD(model, **FREE, **options), Reference(model, variant=options, **FREE))


def test_compat_is_all_the_options_and_may_stand_beside_any_that_agree():
    assert asdict(ORIGINAL) == CODE
    assert TSD(classifier(), compat="original").variant == ORIGINAL
    assert TSD(classifier(), compat="original", **CODE, steps=1, episodic=False, filter_k=DROP_LAST).variant == ORIGINAL
    assert TSD(classifier()).variant == Variant()


def test_the_codes_distillation_is_torchs_kl_divergence_of_two_softmaxes():
    generator = seeded(0)
    features = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(6, 4, generator=generator, dtype=torch.float64).softmax(dim=1)
    bank = members(
        torch.randn(9, 5, generator=generator, dtype=torch.float64),
        torch.randn(9, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1.0, 1.0, 0.0]) - 3,
    )
    bank = Bank(bank.features, bank.scores, bank.labels.clamp(max=2), bank.entropies)
    centres = F.normalize(bank.features, dim=1).T @ F.one_hot(bank.labels, 4).double()
    distances = F.normalize(features, p=1, dim=1) @ F.normalize(centres.T, p=1, dim=1).T / 0.7
    expected = F.kl_div(scores.log_softmax(1), distances.softmax(1), reduction="none").sum(1).mean(0)
    options = {name: CODE[name] for name in list(CODE)[:5]}
    loss = distillation_loss(features, scores, bank, temperature=0.7, **options)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, features, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert not centres[:, 3].any()


def test_the_two_directions_of_the_divergence_by_hand():
    bank = members(torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    features, scores = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[0.8, 0.2]]).double()
    q = math.e / (math.e + 1)
    forward = 0.8 * math.log(0.8 / q) + 0.2 * math.log(0.2 / (1 - q))
    reverse = q * math.log(q / 0.8) + (1 - q) * math.log((1 - q) / 0.2)
    for divergence, expected in (("forward", forward), ("reverse", reverse)):
        loss = distillation_loss(features, scores, bank, temperature=1.0, divergence=divergence)
        assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_probability_that_underflows_leaves_loss_and_gradient_finite(divergence):
    bank = members(torch.eye(2), torch.eye(2))
    features = torch.tensor([[2.0, 0.5]], requires_grad=True)
    loss = distillation_loss(features, torch.tensor([[1.0, 0.0]]), bank, temperature=1.0, divergence=divergence)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()
    assert features.grad.any()


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_sample_all_of_whose_mass_is_on_a_class_without_prototype_spoils_no_gradient(divergence):
    bank = members(torch.eye(2), torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]))
    features = torch.tensor([[2.0, 0.5], [2.0, 0.5]], requires_grad=True)
    scores = torch.tensor([[0.0, 0.0, 1.0], [0.8, 0.1, 0.1]])
    distillation_loss(features, scores, bank, temperature=1.0, divergence=divergence).backward()
    assert not features.grad[0].any()
    assert torch.isfinite(features.grad[1]).all()
    assert features.grad[1].any()


def test_classes_without_members_may_have_a_prototype_of_zero():
    bank = members(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 2.0, 0.0], [0.0, 1.0, 0.0]]))
    sums, classes = prototypes(bank, empty_classes="zero")
    assert classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(sums, torch.tensor([[0.0, 0.0], [0.6, 1.8], [0.0, 0.0]]))


def test_a_repelling_local_term_is_the_negative_and_a_sample_itself_is_at_distance_zero_in_probabilities():
    generator = seeded(1)
    bank = members(torch.randn(6, 5, generator=generator), torch.randn(6, 4, generator=generator))
    features, scores = bank.features[:3], torch.rand(3, 4, generator=generator)
    pull = local_loss(features, scores, bank, torch.full((6,), -1), neighbours=3)
    assert local_loss(features, scores, bank, torch.full((6,), -1), neighbours=3, repels=True) == -pull
    rows = torch.tensor([0, 1, 2, -1, -1, -1])
    itself = local_loss(features, bank.scores[:3], bank, rows, neighbours=1, itself=True)
    assert itself == 0
    assert local_loss(features, bank.scores[:3], bank, rows, neighbours=1) != 0


def test_minus_one_drops_the_least_certain_of_each_class_even_a_classs_only_member():
    odds = [[math.log(9), 0, 0], [math.log(3), 0, 0], [0, math.log(2), 0], [0, math.log(4), 0], [0, 0, 1]]
    bank = members(torch.arange(1.0, 3).unsqueeze(1), torch.tensor(odds[:2]))
    kept, rows = remember(bank, members(torch.arange(3.0, 6).unsqueeze(1), torch.tensor(odds[2:])), filter_k=DROP_LAST)
    assert kept.features.squeeze(1).tolist() == [1, 4]
    assert rows.tolist() == [-1, 1]


def test_a_bank_that_minus_one_emptied_is_an_error_unless_prototypes_may_be_zero():
    one = members(torch.eye(3), 9 * torch.eye(3))
    empty, _ = remember(Bank(*(column[:0] for column in one)), one, filter_k=DROP_LAST)
    assert len(empty.labels) == 0
    with pytest.raises(
        AdaptationError, match=r"got an empty one.*set filter_k to at least 1, or empty_classes to zero"
    ):
        distillation_loss(torch.eye(3), one.scores, empty, temperature=1.0)
    loss = distillation_loss(torch.eye(3), one.scores, empty, temperature=1.0, empty_classes="zero")
    assert loss.item() == pytest.approx((one.scores[0] * (3 * one.scores[0]).log()).sum().item())
    assert local_loss(torch.eye(3), one.scores, empty, torch.zeros(0, dtype=torch.int64), neighbours=3) == 0


def test_the_filter_looks_at_the_batch_at_hand_too():
    adapter = TSD(classifier(2), filter_k=3, rate=1e-3)
    entered = 0
    for images in stream(6):
        before = adapter.bank
        log_scores = adapter(images).log_softmax(dim=1)
        entropies = -(log_scores.exp() * log_scores).sum(dim=1)
        for k in range(CLASSES):
            old, new = before.entropies[before.labels == k], entropies[log_scores.argmax(dim=1) == k]
            kept = adapter.bank.entropies[adapter.bank.labels == k].sort().values
            torch.testing.assert_close(kept, torch.cat([old, new]).sort().values[:3])
            entered += bool(len(new)) and new.min().item() < old.max().item()
    assert entered > CLASSES


@pytest.mark.parametrize("options", [{}, {"local_repels": True, "train_mode": True}], ids=str)
def test_several_steps_learn_several_times_and_the_bank_holds_the_batch_once(options):
    model = dropping_classifier(2)
    free = FREE | {"filter_k": None}
    adapter = TSD(model, **free, **options, steps=3)
    reference = Reference(model, variant=options, **free)
    for index, images in enumerate(stream(4)):
        older = list(reference.members)
        with seeding.seeded("tsd", 0, index):
            first = reference(images)
            for _ in range(2):
                reference.members = list(older)
                reference(images)
        torch.testing.assert_close(adapter(images), first, rtol=0, atol=1e-9)
        check_same(adapter, reference)
        assert len(adapter.bank.labels) == CLASSES + 9 * (index + 1)


@pytest.mark.parametrize("options", [{}, {"train_mode": True}], ids=str)
def test_a_prediction_after_the_steps_is_the_learnt_models(options):
    model = dropping_classifier(2)
    adapter = TSD(model, **FREE | {"rate": 0.01}, **options, predict="after")
    reference = Reference(model, variant=options, **FREE | {"rate": 0.01})
    for index, images in enumerate(stream(4)):
        with seeding.seeded("tsd", 0, index):
            before, after = reference(images), reference.forward(images)[1].detach()
        torch.testing.assert_close(adapter(images), after, rtol=0, atol=1e-9)
        assert not torch.allclose(before, after)


@pytest.mark.parametrize("options", [{}, {"train_mode": True}], ids=str)
def test_episodic_forgets_model_bank_and_random_numbers_before_each_batch(options):
    model = dropping_classifier(2)
    adapter = TSD(model, **FREE, **options, episodic=True, steps=2, predict="after")
    for images in stream(4):
        fresh = TSD(model, **FREE, **options, steps=2, predict="after")
        assert torch.equal(adapter(images), fresh(images))
        assert len(adapter.bank.labels) == len(fresh.bank.labels)


MODES = [{"compat": "original"}, {"local_itself": True, "filter_k": DROP_LAST}, {"train_mode": True, "steps": 2}]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_a_state_from_mid_stream_goes_on_bit_for_bit(options):
    model = dropping_classifier(2)
    first, *others = (TSD(model, rate=0.01, **options) for _ in range(3))
    batches = stream(8)
    for images in batches[:4]:
        first(images)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others[1](batches[6])
    for other in others:
        other.load_state_dict(saved)
    for images in batches[4:]:
        logits = first(images)
        for other in others:
            assert torch.equal(other(images), logits)
    for other in others:
        assert same(state(other.model), state(first.model))
        assert all(torch.equal(left, right) for left, right in zip(other.bank, first.bank, strict=True))


def test_dropout_neither_reads_nor_moves_the_global_generator_and_differs_from_batch_to_batch():
    images = stream(1)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = TSD(dropping_classifier(), rate=1e-12, train_mode=True)
        before = torch.get_rng_state()
        first, second = adapter(images), adapter(images)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
        assert torch.equal(TSD(dropping_classifier(), rate=1e-12, train_mode=True)(images), first)
    assert not torch.allclose(first, second)
    assert not torch.allclose(TSD(dropping_classifier(), train_mode=True, seed=1)(images), first)
    adapter.reset()
    assert torch.equal(adapter(images), first)
    adapter.reset()
    with pytest.raises(AdaptationError, match="NaN or infinity"):
        adapter(images / 0)
    assert torch.equal(adapter(images), first), "a batch that was an error does not count"


@pytest.mark.parametrize(
    ("contradiction", "message"),
    [({name: value}, f"{name} .*got {value}") for name, value in asdict(Variant()).items()]
    + [
        ({"steps": 3}, "steps 1, got 3"),
        ({"episodic": True}, "episodic False, got True"),
        ({"predict": "after"}, "predict before, got after"),
        ({"filter_k": None}, "can not keep all members; leave out filter_k"),
    ],
    ids=str,
)
def test_an_option_that_contradicts_compat_is_an_error(contradiction, message):
    with pytest.raises(AdaptationError, match=f"compat 'original'.*{message}"):
        TSD(classifier(), compat="original", **contradiction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compat": "paper"}, "expected compat to be original or None, got 'paper'"),
        ({"normalise": "l3"}, "expected normalise to be one of l2, l1; got 'l3'"),
        ({"target": "softmax"}, "one of prediction, softmax_of_prediction; got 'softmax'"),
        ({"divergence": "js"}, "one of forward, reverse; got 'js'"),
        ({"consistency_filter": 1}, "expected consistency_filter to be one of True, False; got 1"),
        ({"empty_classes": "one"}, "one of left_out, zero; got 'one'"),
        ({"local_compares": "scores"}, "one of probabilities, logits; got 'scores'"),
        ({"train_mode": "yes"}, "expected train_mode to be one of True, False; got 'yes'"),
        ({"local_weight": math.nan}, "local_weight of at least 0, got nan"),
        ({"temperature": math.nan}, "a temperature above 0.*got temperature nan"),
        ({"filter_k": -2}, "filter_k of at least 1.*got -2"),
        ({"local_weight": 0, "local_repels": True}, "local_repels without effect: local_weight is 0"),
        ({"local_weight": 0, "local_compares": "logits", "local_itself": True}, "local_compares, local_itself without"),
        ({"seed": 0}, "seed 0 without effect"),
    ],
    ids=str,
)
def test_options_out_of_range_or_without_effect_are_errors(options, message):
    with pytest.raises(AdaptationError, match=message):
        TSD(classifier(), **options)


def with_classes(count):
    model = classifier()
    return Classifier(model.featurizer, nn.Linear(model.head.in_features, count).double())


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize("parameters", ["all", "affine"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _, other: other.state_dict(), r"\(7, 5\)|of shape \[4\], got \[7\]"),
        (lambda own, _: without(own, "bank"), "expected a state with adapter, bank, batches"),
        (lambda own, _: without(own, "batches"), "expected a state with adapter, bank, batches"),
        (lambda own, _: own | {"bank": without(own["bank"], "labels")}, "expected a bank with "),
        (lambda own, _: own | {"bank": own["bank"] | {"labels": own["bank"]["labels"][1:]}}, "expected a bank of 5 "),
        (lambda own, _: own | {"bank": own["bank"] | {"features": own["bank"]["features"][:, 1:]}}, "a bank of 5 "),
        (lambda own, _: own | {"bank": own["bank"] | {"labels": own["bank"]["labels"] + 4}}, "pseudo-classes below 4"),
    ],
    ids=[
        "other classes",
        "no bank",
        "no batches",
        "no labels",
        "a label missing",
        "a feature missing",
        "labels beyond the classes",
    ],
)
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(parameters, spoil, message):
    adapter, untouched = (TSD(classifier(), parameters=parameters, rate=0.01) for _ in range(2))
    first, second = stream(2)
    adapter(first), untouched(first)
    other = TSD(with_classes(7), parameters=parameters)
    other(first)
    with pytest.raises(AdaptationError, match=message):
        adapter.load_state_dict(spoil(adapter.state_dict(), other))
    assert same(state(adapter.model), state(untouched.model))
    assert torch.equal(adapter(second), untouched(second))
    assert all(torch.equal(left, right) for left, right in zip(adapter.bank, untouched.bank, strict=True))


def test_a_float64_bank_fits_a_float32_adapter():
    double, single = TSD(classifier(2), filter_k=5), TSD(classifier(2).float(), filter_k=5)
    first, second = stream(2)
    double(first)
    single.load_state_dict(double.state_dict())
    assert single.bank.features.dtype == torch.float32
    torch.testing.assert_close(single(second.float()).double(), double(second), rtol=1e-3, atol=1e-3)
