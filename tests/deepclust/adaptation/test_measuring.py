"""What adapters answer, against each one asked on its own; the table, against numbers by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepclust.adaptation import ADAPTERS, BN, Classifier, Source, Tent, measuring, shifts
from deepclust.adaptation.base import AdapterConfig
from deepclust.adaptation.guard import Baselines, Guard
from deepclust.errors import AdaptationError
from deepclust.models.features import to_float
from tests.tasks import shift_workspace

CPU = torch.device("cpu")
Key = tuple[str, bool]


def shift(labels: Sequence[int], name: str = "contrast", severity: int = 5) -> shifts.Shift:
    count = len(labels)
    images = np.zeros((count, 8, 8, 1), np.uint8)
    return shifts.Shift(name, severity, images, np.array(labels), [str(number) for number in range(count)])


def stream(pairs: Sequence[tuple[int, int]], sizes: Sequence[int]) -> shifts.Stream:
    ends = np.cumsum(sizes).tolist()
    batches = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    found = np.array(pairs)
    return shifts.Stream(found[:, 0], found[:, 1], batches)


def logits(classes: Sequence[int], confidence: float) -> Tensor:
    """Logits of 3 classes whose softmax is the confidence at the class, and the rest in equal parts."""
    chances = torch.full((len(classes), 3), (1 - confidence) / 2, dtype=torch.float64)
    chances[range(len(classes)), list(classes)] = confidence
    return chances.log()


def answers(classes: Sequence[int], confidence: float = 0.8, own: Sequence[int] | None = None) -> measuring.Answers:
    found = measuring.Answers.of(len(classes))
    found.put(slice(0, len(classes)), logits(classes, confidence), None if own is None else logits(own, 0.5), 0)
    return found


# Five images of one labelled shift, four of one without labels.
SHIFTS = [shift([0, 1, 2, 0, 1]), shift([-1] * 4, "sketch", 0)]
STREAM = stream([(0, row) for row in range(5)] + [(1, row) for row in range(4)], [5, 4])
MADE: dict[Key, measuring.Answers] = {
    ("source", False): answers([0, 1, 2, 1, 0, 0, 0, 1, 2]),  # 2 of 5 wrong
    ("bn", False): answers([0, 1, 2, 0, 0, 0, 0, 0, 0], 0.6),  # 1 of 5 wrong
    ("tent", False): answers([0, 0, 0, 0, 0, 0, 1, 1, 2], 0.9),  # 3 of 5 wrong
    ("tent", True): answers([0, 1, 2, 0, 1, 0, 0, 1, 2], 0.9, own=[0, 0, 0, 0, 0, 0, 1, 1, 2]),
}


def rows(made: dict[Key, measuring.Answers] = MADE, clusters: bool = False) -> dict[tuple[Any, ...], dict[str, Any]]:
    found = measuring.tabulate(made, SHIFTS, STREAM, clusters=clusters)
    assert all(set(row) <= set(measuring.COLUMNS) for row in found)
    return {(row["shift"], row["adapter"], row["guarded"]): row for row in found}


def test_errors_and_their_differences_are_those_of_each_shift_and_indicators_need_no_labels() -> None:
    found = rows()
    assert len(found) == 2 * len(MADE)
    for (name, guarded), error in {("source", 0): 0.4, ("bn", 0): 0.2, ("tent", 0): 0.6, ("tent", 1): 0.0}.items():
        row = found["contrast", name, guarded]
        differences = [row[column] for column in ("error", "minus_source", "minus_bn")]
        assert differences == pytest.approx([error, error - 0.4, error - 0.2])
        assert (row["severity"], row["images"]) == (5, 5)
    assert not any("minus_bn" in row for row in rows({("source", False): MADE["source", False]}).values())
    assert not {"error", "minus_source", "minus_bn", "guard_right", "nmi"} & found["sketch", "tent", 1].keys()
    bn, source = found["sketch", "bn", 0], found["sketch", "source", 0]
    assert (bn["images"], bn["agreement"], source["agreement"]) == (4, 0.5, 1.0)  # with 0 0 1 2 of the source model
    entropy = -(0.6 * np.log(0.6) + 2 * 0.2 * np.log(0.2))
    assert [bn[column] for column in ("confidence", "entropy", "classes_used")] == pytest.approx([0.6, entropy, 1])
    assert source["classes_used"] == pytest.approx(np.exp(-(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))))


def test_clusters_are_matched_with_classes_and_have_no_guard_that_is_right() -> None:
    permuted = answers([2, 0, 1, 2, 0, 0, 0, 0, 0])
    found = rows(MADE | {("permuted", False): permuted}, clusters=True)
    # tent says 0 alone, so its cluster is matched with class 0 or 1, two images each; source: 0 1 2 1 0 for 0 1 2 0 1.
    for key, error in {("tent", 0): 0.6, ("source", 0): 0.4, ("tent", 1): 0, ("permuted", 0): 0}.items():
        row = found["contrast", *key]
        assert [row["error"], row["minus_source"]] == pytest.approx([error, error - 0.4])
    assert found["contrast", "tent", 0]["nmi"] == 0
    assert found["contrast", "permuted", 0]["nmi"] == pytest.approx(1)
    assert not any("guard_right" in row for row in found.values())


class Counted(list[slice]):
    """Batches that count how often they are gone through."""

    rounds = 0

    def __iter__(self) -> Iterator[slice]:
        self.rounds += 1
        return super().__iter__()


def test_a_guard_is_judged_on_many_mixed_shifts_as_batch_by_batch_and_in_one_go() -> None:
    random = np.random.default_rng(3)
    count, size, batch_size = 12, 20, 9
    many = [shift(random.integers(0, 3, size).tolist(), f"shift{number}") for number in range(count)]
    pairs = random.permutation([(index, row) for index in range(count) for row in range(size)])
    met = shifts.Stream(pairs[:, 0], pairs[:, 1], Counted(shifts.cuts(len(pairs), batch_size)))
    truth = np.array([many[index].labels[row] for index, row in pairs])

    def erring(share: float) -> Any:
        return np.where(random.random(len(truth)) < share, (truth + 1) % 3, truth)

    source, own, given = erring(0.5), erring(0.5), erring(0.4)
    made: dict[Key, measuring.Answers] = {("source", False): answers(source)}
    made |= {(name, True): answers(given, own=own) for name in ("bn", "tent", "t3a")}
    made["tent", True].given[:] = whose = random.integers(0, 3, len(truth))
    own[30:60] = made["tent", True].own[30:60] = -1  # batches on which the adapter had no answer
    found = measuring.tabulate(made, many, met, clusters=False)
    assert met.batches.rounds <= 2 * len(made), "not once a shift"
    expected = []
    for index in range(count):
        good = 0
        for start in range(0, len(truth), batch_size):
            part = [row for row in range(start, min(start + batch_size, len(truth))) if pairs[row, 0] == index]
            wrong = [sum(classes[row] != truth[row] for row in part) for classes in (given, own, source)]
            good += len(part) * (wrong[0] <= min(wrong[1:]))
        expected.append(good / size)
    assert 0 < min(expected) < max(expected) < 1
    rows = {row["shift"]: row for row in found if row["adapter"] == "tent"}
    for index, share in enumerate(expected):
        shares = [share, *(np.mean(whose[pairs[:, 0] == index] == answer) for answer in range(3))]
        columns = ("guard_right", "by_adapter", "by_bn", "by_source")
        assert [rows[f"shift{index}"][column] for column in columns] == pytest.approx(shares)


def test_the_curve_has_each_batch_and_calls_those_of_several_shifts_mixed() -> None:
    batches = stream([(0, 0), (0, 1), (0, 2), (1, 0), (0, 3), (0, 4)], [2, 2, 2])
    made = {("source", False): answers([0, 1, 2, 0, 1, 0]), ("bn", False): answers([0, 0, 2, 1, 0, 1])}
    found = measuring.curve(made, SHIFTS, batches, clusters=False)
    assert all(set(row) <= set(measuring.CURVE) for row in found)
    bn = [row for row in found if row["adapter"] == "bn"]
    met = [(row["shift"], row["severity"], row["images"]) for row in bn]
    assert met == [("contrast", 5, 2), ("mixed", 0, 4), ("contrast", 5, 6)]
    assert [row.get("error") for row in bn] == [0.5, None, 0.0]
    assert [row["agreement"] for row in bn] == [0.5, 0.5, 0.0]
    assert not any("error" in row for row in measuring.curve(made, SHIFTS, batches, clusters=True))


@pytest.fixture(scope="module")
def model() -> Classifier:
    return shift_workspace.classifier_of("small")


@pytest.fixture(scope="module")
def met() -> list[shifts.Shift]:
    images, labels = shift_workspace.images_and_labels(40, seed=1)
    dark = (images * 0.3).astype(np.uint8)
    paths = [str(row) for row in range(40)]
    return [shifts.Shift("clean", 0, images, labels, paths), shifts.Shift("dark", 1, dark, labels, paths)]


def source_images() -> list[Tensor]:
    return [to_float(torch.from_numpy(shift_workspace.images_and_labels(96, seed=0)[0]))]


def options(**stated: dict[str, Any]) -> dict[str, AdapterConfig]:
    return {name: ADAPTERS[name].config_class(**values) for name, values in stated.items()}


@pytest.mark.parametrize("prior", [0.0, 8.0])
def test_every_answer_is_that_of_the_adapter_and_of_its_guard_asked_alone_and_the_model_is_left_as_it_was(
    model: Classifier, met: list[shifts.Shift], prior: float
) -> None:
    stated = options(bn={"prior": prior}, tent={"rate": 0.01}, t3a={})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = measuring.make(model, stated, source_images(), guard=True)
    assert (list(adapters.free), list(adapters.guarded)) == (["source", *stated], list(stated))
    (each,) = shifts.streams(met, "continual", batch_size=16, seed=0)
    found, failed = measuring.follow(adapters, met, each, CPU)
    assert failed == {}
    batches = [shifts.load(met, each, batch) for batch in each.batches]
    for name in adapters.free:
        alone = ADAPTERS[name](model, stated.get(name))
        expected = torch.cat([alone(images) for images in batches])
        chances = expected.double().softmax(1)
        assert found[name, False].classes.tolist() == expected.argmax(1).tolist()
        np.testing.assert_allclose(found[name, False].confidence, chances.amax(1), atol=1e-6)
        np.testing.assert_allclose(found[name, False].entropy, -(chances * chances.log()).nansum(1), atol=1e-5)
    for name in stated:
        guard = Guard(ADAPTERS[name](model, stated[name]), Baselines(model, source_images()))
        given, whose = [], []
        for images in batches:
            given += guard(images).argmax(1).tolist()
            whose += [("adapter", "bn", "source").index(guard.verdict.answer)] * len(images)
        assert found[name, True].classes.tolist() == given
        assert found[name, True].given.tolist() == whose
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Failing(Source):
    """Answers as the source model does, but fails at its second batch."""

    name = "failing"
    met = 0

    def _adapt(self, images: Tensor) -> Tensor:
        self.met += 1
        if self.met == 2:
            raise AdaptationError("expected a first batch, got a second; stop earlier")
        return super()._adapt(images)


def test_an_adapter_that_fails_is_absent_with_its_reason_and_its_guarded_twin_goes_on_as_the_source_model(
    model: Classifier, met: list[shifts.Shift], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADAPTERS, "failing", Failing)
    monkeypatch.setattr(measuring, "Source", type("Other", (), {}))  # whose answers are known
    adapters = measuring.make(model, options(failing={}), source_images(), guard=True)
    (first, _) = shifts.streams(met, "reset", batch_size=10, seed=0)
    found, failed = measuring.follow(adapters, met, first, CPU)
    assert failed == {"failing": "expected a first batch, got a second; stop earlier"}
    assert set(found) == {("source", False), ("failing", True)}
    guarded = found["failing", True]
    assert np.array_equal(guarded.classes, found["source", False].classes)
    assert guarded.given.tolist() == [0] * 10 + [2] * 10 + [0] * 20
    assert guarded.own[10:20].tolist() == [-1] * 10
    assert (guarded.own[:10] >= 0).all()


def test_an_adapter_that_does_not_fit_is_absent_in_both_forms_with_its_reason() -> None:
    pixels = shift_workspace.classifier_of("pixels")
    adapters = measuring.make(pixels, options(bn={}, tent={}, t3a={}, source={}), source_images(), guard=True)
    assert (list(adapters.free), list(adapters.guarded)) == (["source", "t3a"], ["t3a"])
    assert set(adapters.not_applicable) == {"bn", "tent"}
    assert "BatchNorm" in adapters.not_applicable["bn"]


def test_each_adapter_pays_for_its_own_calls_and_a_guarded_one_for_those_it_compares_with(
    model: Classifier, met: list[shifts.Shift], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = measuring.make(model, options(bn={}, tent={}), source_images(), guard=True)
    asked: list[str] = []
    clock = 0.0

    def slow(name: str, seconds: float, call: Any) -> Any:
        def wrapped(*given: Any) -> Any:
            nonlocal clock
            asked.append(name)
            clock += seconds
            return call(*given)

        return wrapped

    monkeypatch.setattr(measuring, "_now", lambda device: clock)
    monkeypatch.setattr(Tent, "_adapt", slow("tent", 1, Tent._adapt))
    monkeypatch.setattr(BN, "_adapt", slow("bn", 10, BN._adapt))
    monkeypatch.setattr(adapters.baselines, "source", slow("source", 100, adapters.baselines.source))
    (first, _) = shifts.streams(met, "reset", batch_size=20, seed=0)
    found, _ = measuring.follow(adapters, met, first, CPU)
    assert asked == ["source", "bn", "tent", "tent"] * 2, "the guard and bn itself share bn's answer"
    expected = {("source", False): 100, ("bn", False): 10, ("tent", False): 1, ("bn", True): 110, ("tent", True): 111}
    assert {key: each.seconds for key, each in found.items()} == {key: 2 * each for key, each in expected.items()}
