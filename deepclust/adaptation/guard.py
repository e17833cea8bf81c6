"""A guard: an adapter whose answer is given only where there is reason, without any label, to think that it helps.

Two facts carry it. Confidence (the mean of the largest probability) is honest where nothing learns to raise it: under a
shift the source model loses some, and batch statistics win it back exactly where they help; on small batches and on
batches of few classes they lose more. And an adapter is never worse than the model it is compared with by more than the
share of images on which the two differ. So, over a window of the newest images:

1. `bn` is trusted instead of the source model where it wins back at least half of the confidence that the source model
   has lost against source images, and at least `LEAST_GAIN` (where that loss is not known: `UNKNOWN_GAIN`), by more
   than chance.
2. The adapter's answer is given if it differs from the trusted model's on no larger share of the images than
   `tolerance`, plus, where `bn` is trusted, the confidence that `bn` has won. Otherwise the trusted model's is given.
3. An adapter learns nothing from a batch on which its answer is not given. On a batch that it can not use, the trusted
   model's is given.

It is careful rather than greedy: where the source model is wrong and sure of it, no label-free sign tells, and nothing
is adapted.

Shapes: B images, C classes.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from deepclust.adaptation.adapters.bn import BN
from deepclust.adaptation.adapters.source import Source
from deepclust.adaptation.base import ANOTHER_VERSION, INFERENCE, Adapter
from deepclust.adaptation.classifier import check_images
from deepclust.errors import AdaptationError

UNKNOWN_GAIN = 0.05  # confidence that bn has to win where that of source images is not known
LEAST_GAIN = 0.02  # and where it is known
SURE = 1.64  # standard errors: one-sided 95 %
COLLAPSED = 0.5  # share of the trusted model's entropy of the mean prediction

Answer = Literal["adapter", "bn", "source"]
_log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """Whose answer was given for a batch, and why."""

    answer: Answer
    reason: str


class Evidence(NamedTuple):
    """What a batch says of its images, one number each (B,).

    Attributes:
        source: Confidence of the source model.
        bn: Confidence with batch statistics; None where there are none.
        differs_source: Whether the adapter's class is not the source model's; None where the adapter has no answer.
        differs_bn: Whether it is not `bn`'s.
    """

    source: Tensor
    bn: Tensor | None
    differs_source: Tensor | None
    differs_bn: Tensor | None


class Attempt(NamedTuple):
    """What an adapter made of a batch.

    Attributes:
        logits: (B, C), or None if it had no answer.
        before: What `Adapter.undo` takes to be as before the batch; None where nothing is learnt.
        problem: Why it had no answer.
    """

    logits: Tensor | None
    before: dict[str, Any] | None
    problem: str = ""


class Baselines:
    """The two models that a guard compares with: the source model, and `bn` where it applies. Guards may share them.

    Args:
        model: The source model; copied.
        source_images: Batches of source images, without labels, to know how confident the model was; None: not known.

    Attributes:
        confidence: Mean of the source model's largest probability on source images, or None.

    Raises:
        AdaptationError: If there are no source images.
    """

    def __init__(self, model: nn.Module, source_images: Iterable[Tensor] | None = None) -> None:
        self.source = Source(model)
        self._bn: BN | None = None
        with suppress(AdaptationError):
            self._bn = BN(model)
        self.confidence = None if source_images is None else _mean_confidence(self.source, source_images)

    def bn(self, images: Tensor) -> Tensor | None:
        """`bn`'s logits of a batch, None where it has none."""
        try:
            return None if self._bn is None else self._bn(images)
        except AdaptationError:
            return None


class Guard:
    """An adapter with a fallback, of the same contract as the adapters.

    Args:
        adapter: The adapter; the guard drives it from now on.
        model: The source model that the adapter was made from; copied, unless they are `Baselines` already.
        window: Newest images that decide.
        tolerance: Share of the images on which the adapter may always differ: the error that it may cost.

    Attributes:
        name: `guarded` and the adapter's.
        verdict: On the last batch.
        answers: Batches by whose answer was given.
        adapted: The adapter's own logits of the last batch, given or not; None if it had none.

    Raises:
        AdaptationError: If an option is out of range.
    """

    def __init__(
        self, adapter: Adapter, model: nn.Module | Baselines, *, window: int = 256, tolerance: float = 0.01
    ) -> None:
        if window < 1 or not 0 <= tolerance < 1:
            raise AdaptationError(
                f"expected a window of at least 1 image and a tolerance from 0 to below 1, got {window} and {tolerance}"
            )
        self.adapter = adapter
        self.name = f"guarded {adapter.name}"
        self.window, self.tolerance = window, tolerance
        self.baselines = model if isinstance(model, Baselines) else Baselines(model)
        self._start()

    def _start(self) -> None:
        self._evidence: deque[Evidence] = deque()
        self.verdict = Verdict("source", "nothing seen yet")
        self.answers: Counter[Answer] = Counter()
        self.adapted: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of a batch of images (batch, …): the adapter's, `bn`'s or the source model's.

        Raises:
            AdaptationError: If no model can use the batch.
        """
        check_images(images)
        return self.answer(images, self.baselines.source(images), self.baselines.bn(images))

    def answer(self, images: Tensor, source_BC: Tensor, bn_BC: Tensor | None, attempt: Attempt | None = None) -> Tensor:
        """As the call, where the logits of the source model and of `bn` are known already.

        Args:
            images: (B, …).
            source_BC: The source model's logits.
            bn_BC: Those of `bn`, None where it has none.
            attempt: What an adapter with the guard's adapter's options and state has made of the batch, where that is
                known too. The guard's adapter then stays as it was if the attempt is given, and takes the state of
                before the batch if not: go on with attempts of the other one until `verdict` is not the adapter.
        """
        if torch.is_inference_mode_enabled():
            raise AdaptationError(INFERENCE.format(self.name))
        self.adapter.check_mode(images)
        adapted_BC, before, problem = attempt or self._attempt(images, bn_BC)
        self._remember(_evidence(source_BC, bn_BC, adapted_BC))
        won = None if bn_BC is None else self._won_by_bn()
        if adapted_BC is None:
            verdict = Verdict("source" if won is None else "bn", problem)
        else:
            verdict = self._judge(won, source_BC, bn_BC, adapted_BC)
        if before is not None and verdict.answer != "adapter":
            self.adapter.undo(before)
        if verdict.answer != self.verdict.answer or not self.answers:
            _log.info("%s: the answer of %s from now on: %s", self.name, verdict.answer, verdict.reason)
        self.verdict, self.adapted = verdict, adapted_BC
        self.answers[verdict.answer] += 1
        given = {"adapter": adapted_BC, "bn": bn_BC, "source": source_BC}[verdict.answer]
        assert given is not None
        return given

    def _attempt(self, images: Tensor, bn_BC: Tensor | None) -> Attempt:
        if isinstance(self.adapter, BN) and not self.adapter.config.prior:
            return Attempt(bn_BC, None, "bn has no answer: it needs two images, and finite logits")
        try:
            return Attempt(*self.adapter.attempt(images))
        except AdaptationError as error:
            return Attempt(None, None, str(error))

    def reset(self) -> None:
        """Forget the stream: adapter, window and counts."""
        self.adapter.reset()
        self._start()

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the stream has changed."""
        return {
            "adapter": self.adapter.state_dict(),
            "evidence": [evidence._asdict() for evidence in self._evidence],
            "verdict": self.verdict._asdict(),
            "answers": dict(self.answers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring back what `state_dict` returned.

        Raises:
            AdaptationError: If it is another adapter's, or no guard's; the guard is then as before.
        """
        try:
            evidence = deque(_moved(values, self.adapter.device) for values in state["evidence"])
            verdict, answers, adapter = Verdict(**state["verdict"]), Counter(state["answers"]), state["adapter"]
        except (KeyError, TypeError, AttributeError) as error:
            raise AdaptationError(
                f"expected a state with adapter, evidence, verdict, answers, got one that does not fit ({error}); "
                f"{ANOTHER_VERSION}"
            ) from error
        unknown = {verdict.answer, *answers} - set(get_args(Answer))
        if unknown:
            raise AdaptationError(
                f"expected the answers {', '.join(get_args(Answer))} in the state, got {sorted(map(str, unknown))}; "
                f"{ANOTHER_VERSION}"
            )
        self.adapter.load_state_dict(adapter)
        self._evidence, self.verdict, self.answers = evidence, verdict, answers

    def _remember(self, evidence: Evidence) -> None:
        """Add a batch, and drop the oldest ones that the window does not need."""
        self._evidence.append(evidence)
        count = sum(len(each.source) for each in self._evidence)
        while count - len(self._evidence[0].source) >= self.window:
            count -= len(self._evidence.popleft().source)

    def _judge(self, won: float | None, source_BC: Tensor, bn_BC: Tensor | None, adapted_BC: Tensor) -> Verdict:
        trusted: Answer = "source" if won is None else "bn"
        allowed = self.tolerance + (won or 0.0)
        differs = [each.differs_bn if trusted == "bn" else each.differs_source for each in self._evidence]
        share = float(torch.cat([each for each in differs if each is not None]).double().mean())
        reason = f"it differs from {trusted} on {share:.1%} of the images, {allowed:.1%} allowed"
        if share <= allowed:
            return Verdict("adapter", reason)
        trusted_BC = bn_BC if trusted == "bn" else source_BC
        assert trusted_BC is not None
        own, other = _spread(adapted_BC), _spread(trusted_BC)
        symptom = "few classes take over, and " if own < COLLAPSED * other else ""
        return Verdict(trusted, symptom + reason)

    def _won_by_bn(self) -> float | None:
        """Confidence that `bn` has won over the source model, if that is enough to trust it."""
        known = [each for each in self._evidence if each.bn is not None]
        if not known:
            return None
        source = torch.cat([each.source for each in known]).double()
        gain = torch.cat([each.bn for each in known if each.bn is not None]).double() - source
        mean, count = float(gain.mean()), len(gain)
        error = float(gain.std()) / math.sqrt(count) if count > 1 else math.inf
        needed = UNKNOWN_GAIN
        if self.baselines.confidence is not None:
            needed = max((self.baselines.confidence - float(source.mean())) / 2, LEAST_GAIN)
        return mean if mean >= needed and mean > SURE * error else None


def _mean_confidence(source: Source, batches: Iterable[Tensor]) -> float:
    found = [source(images).softmax(dim=1).amax(dim=1) for images in batches]
    if not found:
        raise AdaptationError("expected images of the source to take the confidence from, got none")
    return float(torch.cat(found).double().mean())


def _evidence(source_BC: Tensor, bn_BC: Tensor | None, adapted_BC: Tensor | None) -> Evidence:
    classes = None if adapted_BC is None else adapted_BC.argmax(dim=1)
    return Evidence(
        source=source_BC.softmax(dim=1).amax(dim=1),
        bn=None if bn_BC is None else bn_BC.softmax(dim=1).amax(dim=1),
        differs_source=None if classes is None else classes != source_BC.argmax(dim=1),
        differs_bn=None if classes is None or bn_BC is None else classes != bn_BC.argmax(dim=1),
    )


def _moved(values: dict[str, Any], device: torch.device) -> Evidence:
    moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in values.items()}
    return Evidence(**moved)


def _spread(logits_BC: Tensor) -> float:
    """Entropy of the mean prediction, in nats."""
    mean_C = logits_BC.softmax(dim=1).mean(dim=0)
    return float(-torch.xlogy(mean_C, mean_C).sum())
