"""TSD, and where its authors' code deviates from the paper, against loops in float64, by hand, and invariants."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust import config, seeding
from deepclust.adaptation import Classifier
from deepclust.adaptation.adapters.tsd import PAPER, TSD, Config, Deviations, distillation_loss, local_loss
from deepclust.adaptation.bank import DROP_LAST, Bank, members, remember
from deepclust.errors import AdaptationError, ConfigError
from tests.deepclust.adaptation import naive
from tests.deepclust.adaptation.nets import (
    CLASSES,
    HIDDEN,
    ROLES,
    changed,
    classifier,
    layer_normed,
    same,
    state,
    stream,
)

DROPOUT = 0.3
FREE = {"rate": 1e-3, "parameters": "all", "filter_k": 5, "local_weight": 0.3}
CODE = {
    "normalise": "l1",
    "target": "softmax_of_prediction",
    "divergence": "reverse",
    "consistency_filter": False,
    "empty_classes": "zero",
    "local_compares": "logits",
    "local_itself": True,
    "local_repels": True,
    "train_mode": True,
}


def dropping_classifier(seed=0):
    """The tests' net with dropout behind its ReLU; the names of its parameters stay."""
    model = classifier(seed)
    model.featurizer[3] = nn.Sequential(nn.ReLU(), nn.Dropout(DROPOUT))
    return model


def length(row, norm="l2"):
    return row.abs().sum() if norm == "l1" else (row**2).sum().sqrt()


def exponentials(values):
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


class Reference:
    """TSD and each deviation of the code in loops over samples, classes and members."""

    def __init__(self, model, free, its=PAPER):
        self.p, self.free, self.its = naive.values(model), free, its
        self.names, self.adam = ROLES[free.parameters], naive.Adam(ROLES[free.parameters], free.rate)
        self.filtered = 0
        self.members = [self.member(row, self.p["w"] @ row + self.p["b"]) for row in self.p["w"]]

    @staticmethod
    def member(feature, logits):
        score = exponentials(logits.tolist())
        entropy = -sum(value * math.log(value) for value in score)
        return {"z": feature, "s": score, "label": score.index(max(score)), "entropy": entropy}

    def forward(self, p, images):
        hidden, mask = naive.inside(p, images), 1
        if self.its.train_mode:  # whoever runs the reference seeds the global generator
            mask = F.dropout(torch.ones(len(images), HIDDEN, dtype=torch.float64), DROPOUT)
        features = naive.features(p, hidden, *naive.moments(hidden), mask)
        return features, features @ p["w"].T + p["b"]

    def __call__(self, images):
        p = naive.learning(self.p, self.names)
        features, logits = self.forward(p, images)
        current = [self.member(z.detach(), row.detach()) for z, row in zip(features, logits, strict=True)]
        self.members = self.members + current
        filter_k = -1 if self.its.drop_last else self.free.filter_k
        if filter_k is not None:
            kept = []
            for k in range(CLASSES):
                of_class = [member for member in self.members if member["label"] == k]
                # With -1 the slice leaves out the last, the least certain.
                kept += sorted(of_class, key=lambda member: member["entropy"])[:filter_k]
            self.members = [member for member in self.members if any(member is other for other in kept)]
        weight = 0 if self.free.compat else self.free.local_weight
        loss = self.distillation(features, current) + weight * self.local(features, logits, current)
        self.p = self.adam(p, loss)
        return logits.detach()

    def similarity(self, left, right):
        norm = self.its.normalise
        return (left * right).sum() / length(left, norm) / length(right, norm) if right.any() else (left * right).sum()

    def distillation(self, features, current):
        its, nothing = self.its, torch.zeros_like(features[0].detach())
        centres = dict.fromkeys(range(CLASSES), nothing) if its.empty_classes == "zero" else {}
        for member in self.members:
            centres[member["label"]] = centres.get(member["label"], nothing) + member["z"] / length(member["z"])
        losses, count = [], 0
        for z, sample in zip(features, current, strict=True):
            cosines = {k: self.similarity(z, centre) / self.free.temperature for k, centre in centres.items()}
            q = {k: torch.exp(cosine) / sum(map(torch.exp, cosines.values())) for k, cosine in cosines.items()}
            if its.consistency_filter and max(q, key=lambda k: q[k].item()) != sample["label"]:
                self.filtered += 1
                continue
            count += 1
            target = exponentials(sample["s"]) if its.target == "softmax_of_prediction" else sample["s"]
            t = {k: target[k] / sum(target[j] for j in centres) for k in centres}
            for k in centres:
                difference = math.log(t[k]) - torch.log(q[k])
                losses.append(t[k] * difference if its.divergence == "forward" else -q[k] * difference)
        return sum(losses) / count if count else features.sum() * 0

    def local(self, features, logits, current):
        losses = []
        for z, row, sample in zip(features, logits, current, strict=True):
            value = row if self.its.local_compares == "logits" else naive.softmax(row)
            others = [member for member in self.members if self.its.local_itself or member is not sample]
            others.sort(key=lambda member: -self.similarity(z.detach(), member["z"]).item())
            pulls = [
                self.similarity(z.detach(), member["z"])
                * ((value - torch.tensor(member["s"], dtype=z.dtype)) ** 2).sum()
                for member in others[: self.free.neighbours]
            ]
            losses.append(sum(pulls) / len(pulls) * (-1 if self.its.local_repels else 1))
        return sum(losses) / len(losses)


def check_same(adapter, reference):
    assert adapter.bank.labels.tolist() == [member["label"] for member in reference.members]
    for name, key in (("features", "z"), ("scores", "s"), ("entropies", "entropy")):
        rows = [torch.as_tensor(member[key], dtype=torch.float64) for member in reference.members]
        torch.testing.assert_close(getattr(adapter.bank, name), torch.stack(rows), rtol=0, atol=1e-9)
    naive.close(adapter.model, reference.p)


def run_both(adapter, reference, batches=5):
    for index, images in enumerate(stream(batches)):
        with seeding.seeded("tsd", reference.its.seed, index):
            expected = reference(images)
        torch.testing.assert_close(adapter(images), expected, rtol=0, atol=1e-9)
        check_same(adapter, reference)


# With seed 3 the stream leaves a class without members.
@pytest.mark.parametrize(
    ("options", "seed"),
    [
        ({}, 3),
        ({"filter_k": None}, 2),
        ({"parameters": "affine", "rate": 1e-2, "filter_k": 1, "neighbours": 50}, 2),
        ({"parameters": "body", "temperature": 0.1, "local_weight": 0.0}, 2),
        ({"parameters": "head", "neighbours": 5, "local_weight": 2.0}, 3),
    ],
    ids=str,
)
def test_a_stream_is_that_of_the_reference_predictions_bank_and_weights(options, seed):
    model, free = classifier(seed), Config(**FREE | options)
    adapter, reference = TSD(model, free), Reference(model, free)
    run_both(adapter, reference)
    assert 0 < reference.filtered < 5 * 9, "the stream has to exercise the consistency filter"
    assert (len(adapter.bank.labels.unique()) == CLASSES) == (seed == 2)


def test_compat_is_the_reference_of_the_codes_semantics():
    model, free = dropping_classifier(2), Config(**FREE | {"local_weight": None, "compat": "original"})
    adapter = TSD(model, free)
    assert config.as_dict(adapter.deviations) == CODE | {"drop_last": False, "seed": 0}
    run_both(adapter, Reference(model, free, Deviations(**CODE)))
    assert not same(state(adapter.model), state(TSD(model).model)), "nothing was learnt"


@pytest.mark.parametrize(
    "deviations",
    [*({name: value} for name, value in CODE.items()), {"drop_last": True}, {"train_mode": True, "seed": 5}, CODE],
    ids=lambda deviations: ",".join(deviations),
)
def test_each_deviation_alone_and_all_with_the_local_term_are_the_references(deviations):
    model, free, its = dropping_classifier(3), Config(**FREE), Deviations(**deviations)
    adapter, paper = TSD(model, free, deviations=its), TSD(model, free)
    run_both(adapter, Reference(model, free, its))
    for images in stream(5):
        paper(images)
    assert not same(state(paper.model), state(adapter.model)), "the deviation has to matter on this stream"


def test_several_steps_learn_several_times_and_the_bank_holds_the_batch_once():
    model, its = dropping_classifier(2), Deviations(local_repels=True, train_mode=True)
    options = FREE | {"filter_k": None, "steps": 3, "predict": "after", "rate": 0.01}
    adapter, reference = TSD(model, Config(**options), deviations=its), Reference(model, Config(**options), its)
    for index, images in enumerate(stream(3)):
        older = reference.members
        with seeding.seeded("tsd", 0, index):
            for _ in range(3):
                reference.members = older
                reference(images)
            after = reference.forward(reference.p, images)[1]
        torch.testing.assert_close(adapter(images), after, rtol=0, atol=1e-9)
        check_same(adapter, reference)
        assert len(adapter.bank.labels) == CLASSES + 9 * (index + 1)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_probabilities_that_underflow_or_lie_on_a_class_without_prototype_leave_gradients_finite(divergence):
    its = Deviations(divergence=divergence)
    features = torch.tensor([[2.0, 0.5], [2.0, 0.5]], requires_grad=True)
    loss = distillation_loss(
        features[:1], torch.tensor([[1.0, 0.0]]), members(torch.eye(2), torch.eye(2)), temperature=1.0, its=its
    )
    (gradient,) = torch.autograd.grad(loss, features)
    assert torch.isfinite(gradient).all()
    assert gradient.any()
    bank = members(torch.eye(2), torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]))
    scores = torch.tensor([[0.0, 0.0, 1.0], [0.8, 0.1, 0.1]])
    distillation_loss(features, scores, bank, temperature=1.0, its=its).backward()
    assert not features.grad[0].any()
    assert distillation_loss(features[:1], scores[:1], bank, temperature=1.0, its=its) == 0, "no sample counts"
    assert torch.isfinite(features.grad[1]).all()
    assert features.grad[1].any()


def test_a_bank_that_lost_its_last_members_is_an_error_unless_prototypes_may_be_zero():
    one = members(torch.eye(3), 9 * torch.eye(3))
    empty, _ = remember(Bank(*(column[:0] for column in one)), one, filter_k=DROP_LAST)
    assert len(empty.labels) == 0
    with pytest.raises(AdaptationError, match=r"got an empty one.*leave it off, or set empty_classes to zero"):
        distillation_loss(torch.eye(3), one.scores, empty, temperature=1.0)
    loss = distillation_loss(torch.eye(3), one.scores, empty, temperature=1.0, its=Deviations(empty_classes="zero"))
    assert loss.item() == pytest.approx((one.scores[0] * (3 * one.scores[0]).log()).sum().item())
    assert local_loss(torch.eye(3), one.scores, empty, torch.zeros(0, dtype=torch.int64), neighbours=3) == 0


def test_dropout_neither_reads_nor_moves_the_global_generator_and_a_batch_that_was_an_error_does_not_count():
    model, images = dropping_classifier(), stream(1)[0]
    adapter, other = (TSD(model, Config(rate=1e-12), deviations=Deviations(train_mode=True)) for _ in range(2))
    before = torch.get_rng_state()
    first, second = adapter(images), adapter(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(first, second)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        with pytest.raises(AdaptationError, match="NaN or infinity"):
            other(images / 0)
        assert torch.equal(other(images), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compat": "original", "local_weight": 0.1}, "means local_weight 0, got 0.1; make it null, or compat null"),
        ({"compat": "original", "steps": 3}, "compat 'original' means steps 1, got 3; make it 1, or compat null"),
        ({"compat": "original", "filter_k": None}, "can not keep all members; give filter_k"),
        ({"local_weight": 0.0, "parameters": "head"}, "no gradient reaches parameters head"),
    ],
    ids=str,
)
def test_options_against_each_other_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        Config(**options)


def test_what_tsd_can_not_do_is_an_error_and_batch_norm_is_not_needed():
    with pytest.raises(ConfigError, match="compat 'original' says all deviations; leave out one of the two"):
        TSD(classifier(), Config(compat="original"), deviations=PAPER)
    with pytest.raises(ConfigError, match="local_itself, local_repels without effect: local_weight is 0"):
        TSD(classifier(), Config(local_weight=0.0), deviations=Deviations(local_itself=True, local_repels=True))
    with pytest.raises(ConfigError, match="seed 3 without effect: nothing is random but in train_mode"):
        Deviations(seed=3)
    with pytest.raises(AdaptationError, match=r"this featurizer has no parameters; use the source adapter"):
        TSD(Classifier(nn.Flatten(), nn.Linear(12, 3)))
    model = layer_normed()
    adapter = TSD(model, Config(parameters="affine", rate=0.1))
    for images in stream(3, batch_size=1):
        adapter(images)
    assert changed(model, adapter.model) == ["featurizer.2.weight", "featurizer.2.bias"]
