"""What every adapter answers on every stream, guarded and not, and the table that follows from it.

Nothing is computed twice for a batch: guards share the answers of the source model and of `bn`, adapters that leave the
model as it is share its features, and a guarded adapter shares what the unguarded one does until its guard first takes
a batch back.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepclust.adaptation import ADAPTERS, Classifier, WholeModel
from deepclust.adaptation.adapters.bn import BN
from deepclust.adaptation.adapters.source import Source
from deepclust.adaptation.base import Adapter, AdapterConfig
from deepclust.adaptation.guard import Attempt, Baselines, Guard
from deepclust.adaptation.shifts import Shift, Stream, load
from deepclust.errors import AdaptationError
from deepclust.evaluation import metrics

COLUMNS = [
    *("classifier", "setting", "batch_size", "shift", "severity", "adapter", "guarded", "images"),
    *("error", "minus_source", "minus_bn", "nmi", "confidence", "entropy", "agreement", "classes_used"),
    *("by_adapter", "by_bn", "by_source", "guard_right"),
]
CURVE = [*COLUMNS[:9], "agreement"]
UNGUARDED = ("source",)  # nothing to fall back from


@dataclass
class Answers:
    """What one adapter answered along a stream of M images, filled in batch by batch.

    Attributes:
        classes: (M,) predicted classes.
        confidence: (M,) largest probability.
        entropy: (M,) of the prediction, in nats.
        own: (M,) classes that the adapter would have answered without its guard; -1 where it had none.
        given: (M,) whose answer was given: 0 the adapter's, 1 bn's, 2 the source model's.
        seconds: Time that it took in all.
    """

    classes: NDArray[np.int64]
    confidence: NDArray[np.float64]
    entropy: NDArray[np.float64]
    own: NDArray[np.int64]
    given: NDArray[np.int8]
    seconds: float = 0.0

    @classmethod
    def of(cls, count: int) -> Answers:
        """Room for `count` images."""
        classes, own = np.full((2, count), -1, np.int64)
        return cls(classes, np.zeros(count), np.zeros(count), own, np.zeros(count, np.int8))

    def put(self, batch: slice, logits: Tensor, own: Tensor | None, given: int) -> None:
        """Fill in a batch."""
        logits = logits.double().cpu()
        chances = logits.softmax(dim=1)
        self.classes[batch] = logits.argmax(dim=1).numpy()
        self.confidence[batch] = chances.amax(dim=1).numpy()
        self.entropy[batch] = -torch.xlogy(chances, chances).sum(dim=1).numpy()
        self.own[batch] = -1 if own is None else own.argmax(dim=1).cpu().numpy()
        self.given[batch] = given


@dataclass
class Adapters:
    """The adapters that apply to a classifier, and why the others do not.

    Attributes:
        free: By name, without a guard; `source` is always there.
        guarded: By name.
        baselines: What guards compare with.
        not_applicable: Name to reason.
    """

    free: dict[str, Adapter]
    guarded: dict[str, Guard]
    baselines: Baselines
    not_applicable: dict[str, str] = field(default_factory=dict)


class _Remembering(nn.Module):
    """A featurizer that computes the features of a batch once, if it is asked for the same batch again and again."""

    def __init__(self, featurizer: nn.Module) -> None:
        super().__init__()
        self.featurizer = featurizer
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not images:
            self._last = images, self.featurizer(images)
        return self._last[1]


def make(
    model: Classifier, options: Mapping[str, AdapterConfig], source_images: Sequence[Tensor], *, guard: bool
) -> Adapters:
    """The adapters with these options, each also behind a guard if asked, which needs batches of source images."""
    found = Adapters({}, {}, Baselines(model, source_images))
    for name in dict.fromkeys(("source", *options)):
        try:
            found.free[name] = ADAPTERS[name](model, options.get(name))
            if guard and name not in UNGUARDED:
                found.guarded[name] = Guard(ADAPTERS[name](model, options[name]), found.baselines)
        except AdaptationError as error:
            found.not_applicable[name] = str(error)
            found.free.pop(name, None)
    if not isinstance(model, WholeModel):
        every = [found.baselines.source, *found.free.values(), *(guard.adapter for guard in found.guarded.values())]
        shared = _Remembering(found.baselines.source.model.featurizer)
        for adapter in every:
            if adapter.frozen:
                adapter.model.featurizer = shared
    return found


def follow(
    adapters: Adapters, shifts: Sequence[Shift], stream: Stream, device: torch.device
) -> tuple[dict[tuple[str, bool], Answers], dict[str, str]]:
    """All adapters, begun afresh, along one stream.

    Returns:
        The answers by name and whether guarded, and why adapters failed on the way. A guarded one never does.
    """
    count = len(stream.shift)
    failed: dict[str, str] = {}
    answers = {(name, False): Answers.of(count) for name in adapters.free}
    answers |= {(name, True): Answers.of(count) for name in adapters.guarded}
    for adapter in adapters.free.values():
        adapter.reset()
    for guard in adapters.guarded.values():
        guard.reset()
    together = set(adapters.guarded)  # with the unguarded adapter of the name: no guard has taken anything back yet
    for batch in stream.batches:
        images = load(shifts, stream, batch).to(device)
        begin = _now(device)
        source = adapters.baselines.source(images)
        after_source = _now(device)
        bn = adapters.baselines.bn(images)
        after_bn = _now(device)
        attempts: dict[str, Attempt] = {}
        tried: dict[str, float] = {}
        for name, adapter in adapters.free.items():
            if name in failed:
                continue
            known, spent = None, after_source - begin if adapter.frozen else 0.0
            if isinstance(adapter, Source):
                known = source
            elif isinstance(adapter, BN) and not adapter.config.prior:
                known, spent = bn, after_bn - after_source
            start = _now(device)
            try:
                if known is not None:
                    logits = known
                elif name in together:
                    logits, before = adapter.attempt(images)
                    attempts[name] = Attempt(logits, before)
                else:
                    logits = adapter(images)
            except AdaptationError as error:
                failed[name] = str(error)
                if name in together:
                    attempts[name] = Attempt(None, adapter.state_dict(), str(error))
                continue
            tried[name] = _now(device) - start
            answers[name, False].put(batch, logits, logits, 0)
            answers[name, False].seconds += spent + _now(device) - start
        for name, guard in adapters.guarded.items():
            start = _now(device)
            logits = guard.answer(images, source, bn, attempts.get(name))
            if guard.verdict.answer != "adapter":
                together.discard(name)
            given = ("adapter", "bn", "source").index(guard.verdict.answer)
            answers[name, True].put(batch, logits, guard.adapted, given)
            shared = tried.get(name, 0.0) if name in attempts else 0.0
            answers[name, True].seconds += after_bn - begin + shared + _now(device) - start
    return {key: value for key, value in answers.items() if key[1] or key[0] not in failed}, failed


def _now(device: torch.device) -> float:
    """Seconds, when the device is done with what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def errors(labels: NDArray[np.int64], classes: NDArray[np.int64], *, clusters: bool = False) -> float:
    """Share of wrong classes; of clusters, of images outside of the class that theirs is matched with: 1 - ACC."""
    return 1 - metrics.matched_accuracy(labels, classes) if clusters else float((labels != classes).mean())


def tabulate(
    answers: Mapping[tuple[str, bool], Answers], shifts: Sequence[Shift], stream: Stream, *, clusters: bool
) -> list[dict[str, Any]]:
    """One row an adapter and shift of a stream. What only labels tell is absent without them."""
    error = functools.partial(errors, clusters=clusters)
    truth = _labels(shifts, stream)
    guards = {
        name: right(found, answers["source", False], truth, stream, shifts=len(shifts))
        for (name, guarded), found in answers.items()
        if guarded
    }
    rows = []
    for index in dict.fromkeys(stream.shift.tolist()):
        where = np.flatnonzero(stream.shift == index)
        shift = shifts[index]
        labels = truth[where]
        known = bool((labels >= 0).all())
        source = answers["source", False].classes[where]
        bn = answers["bn", False].classes[where] if ("bn", False) in answers else None
        for (name, guarded), found in answers.items():
            classes = found.classes[where]
            row: dict[str, Any] = {"shift": shift.name, "severity": shift.severity, "adapter": name}
            row |= {"guarded": int(guarded), "images": len(where)}
            if known:
                own = error(labels, classes)
                row |= {"error": own, "minus_source": own - error(labels, source)}
                row |= {"minus_bn": own - error(labels, bn)} if bn is not None else {}
                row |= {"nmi": metrics.nmi(labels, classes)} if clusters else {}
            row |= {
                "confidence": float(found.confidence[where].mean()),
                "entropy": float(found.entropy[where].mean()),
                "agreement": float((classes == source).mean()),
                "classes_used": _used(classes),
            }
            if guarded:
                shares = np.bincount(found.given[where], minlength=3) / len(where)
                row |= dict(zip(("by_adapter", "by_bn", "by_source"), shares.tolist(), strict=True))
                row |= {"guard_right": float(guards[name][index])} if known and not clusters else {}
            rows.append(row)
    return rows


def right(
    guarded: Answers, source: Answers, labels: NDArray[np.int64], stream: Stream, *, shifts: int
) -> NDArray[np.float64]:
    """Of each shift, the share of images in batches where the guard is no worse than the adapter and the source model.

    Where a batch holds images of several shifts, those of each are judged by themselves. Of all shifts, whose number is
    `shifts`, those that are not in the stream are NaN, and those without labels have no meaning.
    """
    number = np.repeat(np.arange(len(stream.batches)), [batch.stop - batch.start for batch in stream.batches])
    part = number * shifts + stream.shift  # of a batch, the images of one shift

    def of_parts(counted: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(part[counted], minlength=len(stream.batches) * shifts)

    # An adapter without an answer, a class -1, is wrong everywhere.
    given, own, plain = (of_parts(classes != labels) for classes in (guarded.classes, guarded.own, source.classes))
    is_good = (given <= np.minimum(own, plain))[part]
    images = np.bincount(stream.shift, minlength=shifts)
    share: NDArray[np.float64] = np.bincount(stream.shift[is_good], minlength=shifts) / np.where(images, images, np.nan)
    return share


def curve(
    answers: Mapping[tuple[str, bool], Answers], shifts: Sequence[Shift], stream: Stream, *, clusters: bool
) -> list[dict[str, Any]]:
    """One row a batch and adapter; clusters have no error of a single batch, only their agreement with the source's."""
    truth = _labels(shifts, stream)
    rows = []
    for batch in stream.batches:
        index = int(stream.shift[batch.start])
        shift = shifts[index]
        mixed = len(set(stream.shift[batch].tolist())) > 1
        labels = truth[batch]
        source = answers["source", False].classes[batch]
        for (name, guarded), found in answers.items():
            row: dict[str, Any] = {"adapter": name, "guarded": int(guarded), "images": batch.stop}
            row |= {"shift": "mixed" if mixed else shift.name, "severity": 0 if mixed else shift.severity}
            row |= {"agreement": float((found.classes[batch] == source).mean())}
            if (labels >= 0).all() and not clusters:
                row |= {"error": errors(labels, found.classes[batch])}
            rows.append(row)
    return rows


def _labels(shifts: Sequence[Shift], stream: Stream) -> NDArray[np.int64]:
    """(M,) labels of the images of a stream."""
    labels = np.empty(len(stream.shift), np.int64)
    for index, shift in enumerate(shifts):
        where = stream.shift == index
        labels[where] = shift.labels[stream.image[where]]
    return labels


def _used(classes: NDArray[np.int64]) -> float:
    """exp of the entropy of the predicted classes: how many are in use."""
    share = np.bincount(classes) / len(classes)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))
