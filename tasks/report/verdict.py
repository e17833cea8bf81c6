"""Which encoder is best for the data, in words; and on the test set, what beats the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tasks.report import comparison
from tasks.report.comparison import Row, fraction, number, shown, title
from tasks.report.intervals import Interval, wilson

LEAST_RANKME = 5.0  # below it the watchdog, too, takes features for collapsed
_CEILING = 0.9995  # printed as 1.000


def best(rows: Sequence[Row]) -> list[str]:
    """Which encoder is best for this data: by held-out labels, else by a number that needs none; never by test labels.

    Encoders whose intervals overlap that of the best one are named as no different from it.
    """
    labelled = any(number(row, "heldout") is not None for row in rows)
    judged = {str(row["encoder"]): (_heldout if labelled else _stability)(row) for row in rows}
    found = {name: each for name, each in judged.items() if isinstance(each, Interval)}
    left_out = [f"{name} ({each})" for name, each in judged.items() if isinstance(each, str)]
    by = "kNN on held-out labelled training images" if labelled else "the agreement of clusterings over k-means seeds"
    sentences = [_ranked(found, by)]
    if left_out:
        sentences.append(f"Not compared: {listed(left_out)}.")
    if not labelled and len(found) > 1:
        sentences.append(
            "No labels are held out, so this is a hint and no proof: on three labelled sets, 29 of the 32 pairs of "
            "encoders that this agreement told apart were in the order of their accuracies. Look at the clusters."
        )
    return sentences


def _heldout(row: Row) -> Interval | str:
    value, count = number(row, "heldout"), number(row, "heldout_images")
    return "no held-out accuracy" if value is None or not count else wilson(value, int(count))


def _stability(row: Row) -> Interval | str:
    value, rank = number(row, "stability"), number(row, "rankme")
    if value is None:
        return "fewer than three k-means seeds"
    if rank is None or rank < LEAST_RANKME:  # a line of points is cut in the same places again and again
        return f"RankMe {'unknown' if rank is None else shown(row, 'rankme')}: its features may have collapsed"
    spread = number(row, "stability_std") or 0.0
    return Interval(value, value - spread, min(1.0, value + spread))


def _ranked(found: Mapping[str, Interval], by: str) -> str:
    if not found:
        return f"Nothing says which encoder is best for this data: none has {by}."
    if len(found) == 1:
        ((name, only),) = found.items()
        return f"There is nothing to compare {name} with; {by}: {_told(only)}."
    first = max(found, key=lambda name: found[name].value)
    level = [name for name in found if name != first and found[name].high >= found[first].low]
    if len(level) == len(found) - 1:
        told = [f"{name} {_told(each)}" for name, each in found.items()]
        return f"Best for this data, by {by}: no difference between {listed(told)}."
    told = [f"{name} {_told(found[name])}" for name in level]
    others = f"; no difference from {listed(told)}" if told else ""
    return f"Best for this data, by {by}: {first} {_told(found[first])}{others}."


def _told(interval: Interval) -> str:
    return f"{fraction(interval.value)} ({fraction(interval.low)}–{fraction(interval.high)})"


def on_test(rows: Sequence[Row]) -> list[str]:
    """In which of ACC, NMI, kNN and linear accuracy a method beats the baselines on the test set, and in which not."""
    scores = [name for name in comparison.columns(rows) if name in ("acc", "nmi", "linear") or name.startswith("knn")]
    found = {str(row["method"]): row for row in rows if row["method"] in comparison.BASELINES}
    trained = [row for row in rows if row["method"] not in comparison.BASELINES]
    if not trained:
        return ["There are only baselines here."]
    if not scores:
        return ["No test image has a label: there are no accuracies, and you have to judge by the pictures."]
    sentences = [
        f"The baseline {name} is not in `encoders`: nothing is compared with it."
        for name in comparison.BASELINES
        if name not in found and (name != "random" or any(row["method"] != "pretrained" for row in trained))
    ]
    return sentences + [_judged(row, found, scores) for row in trained if found]


def _judged(row: Row, found: Mapping[str, Row], scores: Sequence[str]) -> str:
    """One method against the baselines, score by score."""
    won, lost, full = [], [], []
    for score in scores:
        measured = {name: base for name, base in found.items() if None not in (number(row, score), number(base, score))}
        ahead = {name: _known(row, score) - _known(base, score) for name, base in measured.items()}
        behind = [name for name, lead in ahead.items() if lead <= 0]
        if behind and min(_known(each, score) for each in (row, *(found[name] for name in behind))) >= _CEILING:
            full.append(title(score))
        elif behind:
            against = " and ".join(f"{shown(found[name], score)} of {name}" for name in behind)
            lost.append(f"{title(score)} ({shown(row, score)} against {against})")
        elif ahead:
            spread = max(_known(each, f"{score}_std") for each in (row, *measured.values()))
            close = " (by less than the deviation over seeds)" if min(ahead.values()) <= spread and spread else ""
            won.append(title(score) + close)
    if not (won or lost or full):
        return f"{row['encoder']} has no score in common with the baselines."
    parts = []
    if won:
        parts.append(f"{row['encoder']} beats {listed(list(found))} in {listed(won)}")
    if lost and not won:
        parts.append(f"{row['encoder']} does NOT beat the baselines in {listed(lost)}: it is not working on this data")
    elif lost:
        parts.append(f"but NOT in {listed(lost)}")
    text = ", ".join(parts)
    if full:
        text = f"{text}; both" if text else f"{row['encoder']} and the baselines both"
        text += f" reach 1.000 in {listed(full)}"
    return f"{text}."


def _known(row: Row, name: str) -> float:
    return number(row, name) or 0.0


def listed(names: Sequence[str]) -> str:
    """Names as a person says them: `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
