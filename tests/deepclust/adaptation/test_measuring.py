"""What adapters answer, against each one asked on its own; the table, against numbers by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from deepclust.adaptation import ADAPTERS, BN, Source, Tent, measuring, shifts
from deepclust.adaptation.guard import Baselines, Guard
from deepclust.errors import AdaptationError
from deepclust.models.features import to_float
from tests.tasks import shift_workspace

CPU = torch.device("cpu")


def shift(labels, name="contrast", severity=5):
    images = np.zeros((len(labels), 8, 8, 1), np.uint8)
    return shifts.Shift(name, severity, images, np.array(labels), [str(number) for number in range(len(labels))])


def answers(classes, confidence=0.8, own=None):
    """Logits of 3 classes whose softmax is the confidence at the class, and the rest in equal parts."""
    chances = torch.full((len(classes), 3), (1 - confidence) / 2, dtype=torch.float64)
    chances[range(len(classes)), list(classes)] = confidence
    found = measuring.Answers.of(len(classes))
    others = None if own is None else torch.nn.functional.one_hot(torch.tensor(own), 3)
    found.put(slice(0, len(classes)), chances.log(), others, 0)
    return found


# Five images of one labelled shift, four of one without labels.
SHIFTS = [shift([0, 1, 2, 0, 1]), shift([-1] * 4, "sketch", 0)]
STREAM = shifts.Stream(np.repeat([0, 1], [5, 4]), np.array([*range(5), *range(4)]), [slice(0, 5), slice(5, 9)])
MADE = {
    ("source", False): answers([0, 1, 2, 1, 0, 0, 0, 1, 2]),  # 2 of 5 wrong
    ("bn", False): answers([0, 1, 2, 0, 0, 0, 0, 0, 0], 0.6),  # 1 of 5 wrong
    ("tent", False): answers([0, 0, 0, 0, 0, 0, 1, 1, 2], 0.9),  # 3 of 5 wrong
    ("tent", True): answers([0, 1, 2, 0, 1, 0, 0, 1, 2], 0.9, own=[0, 0, 0, 0, 0, 0, 1, 1, 2]),
}


def rows(made=MADE, clusters=False) -> dict[Any, dict[str, Any]]:
    found = measuring.tabulate(made, SHIFTS, STREAM, clusters=clusters)
    assert all(set(row) <= set(measuring.COLUMNS) for row in found)
    return {(row["shift"], row["adapter"], row["guarded"]): row for row in found}


def test_errors_and_their_differences_are_those_of_each_shift_and_indicators_need_no_labels():
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


def test_clusters_are_matched_with_classes_and_have_no_guard_that_is_right():
    found = rows(MADE | {("permuted", False): answers([2, 0, 1, 2, 0, 0, 0, 0, 0])}, clusters=True)
    # tent says 0 alone, so its cluster is matched with class 0 or 1, two images each; source: 0 1 2 1 0 for 0 1 2 0 1.
    for key, error in {("tent", 0): 0.6, ("source", 0): 0.4, ("tent", 1): 0, ("permuted", 0): 0}.items():
        row = found["contrast", *key]
        assert [row["error"], row["minus_source"]] == pytest.approx([error, error - 0.4])
    assert [found["contrast", name, 0]["nmi"] for name in ("tent", "permuted")] == pytest.approx([0, 1])
    assert not any("guard_right" in row for row in found.values())


def test_a_guard_is_judged_on_many_mixed_shifts_as_batch_by_batch_and_in_one_go():
    class Counted(list):
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            return super().__iter__()

    random = np.random.default_rng(3)
    count, size, batch_size = 12, 20, 9
    many = [shift(random.integers(0, 3, size).tolist(), f"shift{number}") for number in range(count)]
    of, row = random.permutation([(index, row) for index in range(count) for row in range(size)]).T
    met = shifts.Stream(of, row, Counted(shifts.cuts(len(of), batch_size)))
    truth = np.array([each.labels for each in many])[of, row]
    wrong = random.random((3, len(truth))) < [[0.5], [0.5], [0.4]]
    source, own, given = np.where(wrong, (truth + 1) % 3, truth)
    made = {("source", False): answers(source)}
    made |= {(name, True): answers(given, own=own) for name in ("bn", "tent", "t3a")}
    made["tent", True].given[:] = whose = random.integers(0, 3, len(truth))
    made["tent", True].own[30:60] = -1  # batches on which the adapter had no answer
    wrong[1, 30:60] = True
    table = measuring.tabulate(made, many, met, clusters=False)
    found = {row["shift"]: row for row in table if row["adapter"] == "tent"}
    assert met.batches.rounds <= 2 * len(made), "not once a shift"
    batch, rights = np.arange(len(of)) // batch_size, []
    for index in range(count):
        parts = [wrong[:, (of == index) & (batch == number)] for number in range(batch.max() + 1)]
        good = sum(part.shape[1] for part in parts if part[2].sum() <= part[:2].sum(axis=1).min())
        rights.append(good / size)
        shares = [good / size, *(np.mean(whose[of == index] == answer) for answer in range(3))]
        columns = ("guard_right", "by_adapter", "by_bn", "by_source")
        assert [found[f"shift{index}"][column] for column in columns] == pytest.approx(shares)
    assert 0 < min(rights) < max(rights) < 1


def test_the_curve_has_each_batch_and_calls_those_of_several_shifts_mixed():
    batches = shifts.Stream(np.array([0, 0, 0, 1, 0, 0]), np.array([0, 1, 2, 0, 3, 4]), shifts.cuts(6, 2))
    made = {("source", False): answers([0, 1, 2, 0, 1, 0]), ("bn", False): answers([0, 0, 2, 1, 0, 1])}
    found = measuring.curve(made, SHIFTS, batches, clusters=False)
    assert all(set(row) <= set(measuring.CURVE) for row in found)
    columns = ("shift", "severity", "images", "error", "agreement")
    assert [tuple(row.get(column) for column in columns) for row in found if row["adapter"] == "bn"] == [
        ("contrast", 5, 2, 0.5, 0.5),
        ("mixed", 0, 4, None, 0.5),
        ("contrast", 5, 6, 0.0, 0.0),
    ]
    assert not any("error" in row for row in measuring.curve(made, SHIFTS, batches, clusters=True))


@pytest.fixture(scope="module")
def model():
    return shift_workspace.classifier_of("small")


def stream(setting, batch_size):
    """Forty clean images and the same darker, and the first of their streams."""
    images, labels = shift_workspace.images_and_labels(40, seed=1)
    paths = [str(row) for row in range(40)]
    dark = shifts.Shift("dark", 1, (images * 0.3).astype(np.uint8), labels, paths)
    met = [shifts.Shift("clean", 0, images, labels, paths), dark]
    return met, shifts.streams(met, setting, batch_size=batch_size, seed=0)[0]


def source_images():
    return [to_float(torch.from_numpy(shift_workspace.images_and_labels(96, seed=0)[0]))]


def made(model, **stated):
    options = {name: ADAPTERS[name].config_class(**values) for name, values in stated.items()}
    return measuring.make(model, options, source_images(), guard=True)


@pytest.mark.parametrize("prior", [0.0, 8.0])
def test_every_answer_is_that_of_the_adapter_and_of_its_guard_asked_alone_and_the_model_is_left_as_it_was(model, prior):
    stated = {"bn": {"prior": prior}, "tent": {"rate": 0.01}, "t3a": {}, "lame": {}}
    stated["rotta"] = {"rate": 0.1, "nu": 0.5, "update_frequency": 8}  # its guard takes back the second batch
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = made(model, **stated)
    assert (list(adapters.free), list(adapters.guarded)) == (["source", *stated], list(stated))
    met, each = stream("continual", 16)
    found, failed = measuring.follow(adapters, met, each, CPU)
    assert failed == {}
    batches = [shifts.load(met, each, batch) for batch in each.batches]
    for name in adapters.free:
        asked = [ADAPTERS[name](model, ADAPTERS[name].config_class(**stated.get(name, {}))) for _ in range(2)]
        expected = torch.cat([asked[0](images) for images in batches])
        chances = expected.double().softmax(1)
        assert found[name, False].classes.tolist() == expected.argmax(1).tolist()
        np.testing.assert_allclose(found[name, False].confidence, chances.amax(1), atol=1e-6)
        np.testing.assert_allclose(found[name, False].entropy, -(chances * chances.log()).nansum(1), atol=1e-5)
        if name == "source":
            continue
        guard, given, whose, own = Guard(asked[1], Baselines(model, source_images())), [], [], []
        for images in batches:
            given += guard(images).argmax(1).tolist()
            own += guard.adapted.argmax(1).tolist()
            whose += [("adapter", "bn", "source").index(guard.verdict.answer)] * len(images)
        assert found[name, True].classes.tolist() == given
        assert found[name, True].given.tolist() == whose
        assert found[name, True].own.tolist() == own
    assert found["rotta", True].given[::16].tolist() == [0, 2, 2, 2, 2]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_that_fails_is_absent_with_its_reason_and_its_guarded_twin_goes_on_as_the_source_model(
    model, monkeypatch
):
    met, each = stream("reset", 10)
    second = shifts.load(met, each, each.batches[1])

    class Failing(Source):
        def _adapt(self, images):
            if torch.equal(images, second):
                raise AdaptationError("expected a first batch, got a second; stop earlier")
            return super()._adapt(images)

    monkeypatch.setitem(ADAPTERS, "failing", Failing)
    monkeypatch.setattr(measuring, "Source", type("Other", (), {}))  # whose answers are known
    found, failed = measuring.follow(made(model, failing={}), met, each, CPU)
    assert failed == {"failing": "expected a first batch, got a second; stop earlier"}
    assert set(found) == {("source", False), ("failing", True)}
    guarded = found["failing", True]
    assert np.array_equal(guarded.classes, found["source", False].classes)
    assert guarded.given.tolist() == [0] * 10 + [2] * 10 + [0] * 20
    assert np.flatnonzero(guarded.own < 0).tolist() == list(range(10, 20))


def test_an_adapter_that_does_not_fit_is_absent_in_both_forms_with_its_reason():
    adapters = made(shift_workspace.classifier_of("pixels"), bn={}, tent={}, t3a={}, source={})
    assert (list(adapters.free), list(adapters.guarded)) == (["source", "t3a"], ["t3a"])
    assert set(adapters.not_applicable) == {"bn", "tent"}
    assert "BatchNorm" in adapters.not_applicable["bn"]


def test_each_adapter_pays_for_its_own_calls_and_a_guarded_one_for_those_it_compares_with(model, monkeypatch):
    adapters, asked = made(model, bn={}, tent={}), []
    costs = {"tent": 1, "bn": 10, "source": 100}

    def slow(name, place, attribute):
        call = getattr(place, attribute)
        monkeypatch.setattr(place, attribute, lambda *given: asked.append(name) or call(*given))

    monkeypatch.setattr(measuring, "_now", lambda device: sum(costs[name] for name in asked))
    slow("tent", Tent, "_adapt"), slow("bn", BN, "_adapt"), slow("source", adapters.baselines, "source")
    found, _ = measuring.follow(adapters, *stream("reset", 20), CPU)
    assert found["tent", True].given[0] == 2
    once = ["source", "bn", "tent"]
    assert asked == [*once, *once, "tent"], "the guard and bn itself share bn's answer, and tent's until it is refused"
    expected = {("source", False): 100, ("bn", False): 10, ("tent", False): 1, ("bn", True): 110, ("tent", True): 111}
    assert {key: each.seconds for key, each in found.items()} == {key: 2 * each for key, each in expected.items()}


def test_adapters_that_leave_the_model_as_it_is_share_its_features_and_a_guard_what_its_adapter_did(model, monkeypatch):
    adapters = made(model, t3a={}, lame={}, tent={"rate": 10.0})
    featurizers = {id(each.model.featurizer) for name, each in adapters.free.items() if name != "tent"}
    assert featurizers == {id(adapters.guarded[name].adapter.model.featurizer) for name in ("t3a", "lame")}
    asked = []
    adapters.baselines.source.model.featurizer.featurizer.register_forward_hook(lambda *_: asked.append("shared"))
    for name, each in (("free", adapters.free["tent"]), ("guarded", adapters.guarded["tent"].adapter)):
        each.model.register_forward_hook(lambda *_, name=name: asked.append(name))
    found, _ = measuring.follow(adapters, *stream("continual", 16), CPU)
    given = found["tent", True].given[::16].tolist()
    first = next(index for index, whose in enumerate(given) if whose)
    alone = ["shared", "free"], ["shared", "free", "guarded"]
    assert asked == [call for index in range(5) for call in alone[index > first]]
