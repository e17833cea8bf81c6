"""The report's section on adaptation: the stage's tables as heat maps, means, indicators without labels, and curves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

CLIP = 0.2  # difference of errors at which a colour is full
STRONGEST = 0.62  # opacity of a full colour: text stays readable on it, on a light page and on a dark one
BETTER, WORSE = "47, 111, 222", "230, 120, 20"
WINDOW = 8  # batches of the running mean, at most
GUARDED_LINES = 3  # guarded adapters that a curve shows, the best ones
INDICATORS = {
    "confidence": "Confidence (mean of the largest probability, %)",
    "agreement": "Agreement with the source model (% of the images)",
    "classes_used": "Classes in use (exp of the entropy of the predicted classes)",
}
_STREAMS = ("continual", "mixed")  # settings of one long stream, which is worth a curve
_CLEAN = ("clean", "0")

Row = Mapping[str, str]
Who = tuple[str, bool]  # an adapter, and whether it is guarded
_SOURCE: Who = ("source", False)


class Cell(NamedTuple):
    """A number, blank where nothing was measured, and the CSS colour behind it, or an empty string."""

    text: str
    colour: str = ""


class Grid(NamedTuple):
    """A table of adapters by shifts.

    Attributes:
        title: What its numbers are.
        columns: Headings, and whether a vertical line stands to the left of each.
        lines: Adapter, guarded or not, to its cells.
    """

    title: str
    columns: list[tuple[str, bool]]
    lines: dict[Who, list[Cell]]


class Mean(NamedTuple):
    """Of an adapter without and with a guard, over the shifts of a group; a text is blank where nothing was measured.

    Attributes:
        percent: Mean errors.
        best: Whether it is the group's smallest error.
    """

    percent: tuple[str, str]
    best: tuple[bool, bool]


class Segment(NamedTuple):
    """A part of a stream in which the shift stays the same.

    Attributes:
        title: The shift.
        begins: Whether the adapters are reset at its start.
        start: Images seen before it.
        lines: Adapter, guarded or not, to (images seen, value) after each batch.
    """

    title: str
    begins: bool
    start: int
    lines: dict[Who, list[tuple[int, float]]]


class Curve(NamedTuple):
    """A value, named by `label`, along the streams of a group, segment by segment."""

    label: str
    segments: list[Segment]


@dataclass(frozen=True)
class Group:
    """What one classifier met in one setting with batches of one size.

    Attributes:
        classifier: Its name.
        setting: The setting.
        batch_size: Images of a batch.
        rows: Of table.csv.
        order: The shifts, as (name, severity), `clean` first.
    """

    classifier: str
    setting: str
    batch_size: str
    rows: list[Row]
    order: list[tuple[str, str]]

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the others."""
        return self.classifier, self.setting, self.batch_size

    @property
    def title(self) -> str:
        """As printed."""
        return f"{self.classifier}, {self.setting}, batches of {self.batch_size}"

    @property
    def adapters(self) -> list[Who]:
        """`source`, `bn`, then the others in the table's order, each with its guarded variant after it."""
        found = {_who(row) for row in self.rows}
        names = dict.fromkeys(["source", "bn", *(row["adapter"] for row in self.rows)])
        return [who for name in names for who in ((name, False), (name, True)) if who in found]

    def values(self, column: str) -> dict[tuple[Who, tuple[str, str]], float]:
        """A column, by adapter and shift, where it is not blank."""
        return {(_who(row), _shift(row)): float(row[column]) for row in self.rows if row[column]}

    def means(self) -> dict[Who, float]:
        """Mean error of each adapter over the shifts, without `clean`."""
        errors: dict[Who, list[float]] = {}
        for (who, shift), error in self.values("error").items():
            if shift != _CLEAN:
                errors.setdefault(who, []).append(error)
        return {who: sum(found) / len(found) for who, found in errors.items()}


def groups(rows: Sequence[Row], corruptions: Sequence[str]) -> list[Group]:
    """The groups of table.csv, in its order.

    Args:
        rows: Of table.csv.
        corruptions: In the order in which to show them; domains come after them.
    """
    place = {name: index for index, name in enumerate(corruptions)}

    def position(shift: tuple[str, str]) -> tuple[bool, bool, int, str, int]:
        name, severity = shift
        return shift != _CLEAN, severity == "0", place.get(name, len(place)), name, int(severity)

    parts: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        parts.setdefault(_key(row), []).append(row)
    return [Group(*key, own, sorted({_shift(row) for row in own}, key=position)) for key, own in parts.items()]


def name_of(who: Who) -> str:
    """`tent`, or `tent, guarded`."""
    return f"{who[0]}, guarded" if who[1] else who[0]


def heat_map(group: Group) -> Grid | None:
    """Errors in percent, coloured by the difference from the source model's; None without any label."""
    errors, means = group.values("error"), group.means()
    shifts = [shift for shift in group.order if any(place == shift for _, place in errors)]
    if not shifts:
        return None
    lines = {who: [_error(errors.get((who, shift)), errors.get((_SOURCE, shift))) for shift in shifts]
             for who in group.adapters}  # fmt: skip
    columns = _columns(shifts)
    if means:
        columns.append(("mean of the shifts", True))
        for who, cells in lines.items():
            cells.append(_error(means.get(who), means.get(_SOURCE)))
    return Grid("Error, percent", columns, lines)


def indicators(group: Group) -> list[Grid]:
    """What can be measured without labels, of the shifts that have none."""
    labelled = {shift for _, shift in group.values("error")}
    shifts = [shift for shift in group.order if shift not in labelled]
    grids = []
    for name, title in INDICATORS.items() if shifts else ():
        values, scale = group.values(name), 1 if name == "classes_used" else 100
        lines = {
            who: [Cell(f"{values[who, shift] * scale:.1f}" if (who, shift) in values else "") for shift in shifts]
            for who in group.adapters
        }
        grids.append(Grid(title, _columns(shifts), lines))
    return grids


def mean_table(found: Sequence[Group]) -> tuple[list[str], dict[str, list[Mean]]]:
    """Adapters, and for each group that has errors their means, in the adapters' order."""
    measured = [(group, means) for group in found if (means := group.means())]
    names = list(dict.fromkeys(name for group, _ in measured for name, _ in group.adapters))
    table = {}
    for group, means in measured:
        best = min(means.values())
        pairs: list[tuple[Who, Who]] = [((name, False), (name, True)) for name in names]
        table[", ".join(group.key)] = [
            Mean(
                percent=(_percent(means.get(free)), _percent(means.get(guarded))),
                best=(means.get(free) == best, means.get(guarded) == best),
            )
            for free, guarded in pairs
        ]
    return names, table


def guard_sentence(guard: Mapping[str, Any]) -> str:
    """What guards cost at worst, and how often they were right.

    Args:
        guard: `worst`, `worst_setting` and `right` of the stage's metrics; a part that was not measured is None.
    """
    worst, setting, right = guard.get("worst"), guard.get("worst_setting"), guard.get("right")
    parts = []
    if setting is not None:
        shift = "" if worst is None else f" (worst single shift {_points(worst)})"
        how = f"more than {_points(setting)} worse" if setting > 0 else "worse"
        parts.append(f"No guarded adapter was {how} than source in any setting{shift}")
    elif worst is not None:
        only = "On the clean images, the only ones measured, no guarded adapter was more than"
        parts.append(f"{only} {_points(worst)} worse than source")
    if right is not None:
        answer = "a guard's answer was no worse than both the adapter's own and the source model's"
        parts.append(f"on batches with {right * 100:.1f} % of the images, {answer}")
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""


def drawn(found: Sequence[Group]) -> list[Group]:
    """Groups that have a curve: of each classifier and batch size the long streams, else `reset`, else any."""
    chosen: list[Group] = []
    for pair in dict.fromkeys((group.classifier, group.batch_size) for group in found):
        own = [group for group in found if (group.classifier, group.batch_size) == pair]
        long = [group for group in own if group.setting in _STREAMS]
        chosen += long or [group for group in own if group.setting == "reset"] or own[:1]
    return chosen


def curve(group: Group, stream: Sequence[Row]) -> Curve | None:
    """The error after each batch, or the agreement with the source model where a batch has no error.

    All adapters without a guard are drawn, and the best guarded ones.

    Args:
        group: The group.
        stream: Rows of stream.csv.
    """
    rows = [row for row in stream if _key(row) == group.key]
    kept = {who for who in group.adapters if not who[1]}
    if any(row["error"] for row in rows):
        column, label, means = "error", "error", group.means()
        guarded = [who for who in group.adapters if who[1]]
        kept |= set(sorted(guarded, key=lambda who: means.get(who, 1.0))[:GUARDED_LINES])
    else:
        column, label = "agreement", "agreement with source"
        kept -= {_SOURCE}
    segments = _segments([row for row in rows if _who(row) in kept], column, group.setting)
    return Curve(label, segments) if any(part.lines for part in segments) else None


def _segments(rows: Sequence[Row], column: str, setting: str) -> list[Segment]:
    """Rows of one group as segments of running means. A batch across two shifts belongs to the one before it."""
    afresh = setting not in _STREAMS
    several = len({row["severity"] for row in rows if row["severity"] != "0"}) > 1
    segments: list[Segment] = []
    title, offset, end = "", 0, 0
    for row in rows:
        own = "" if setting == "mixed" else _title(_shift(row), several)
        across = row["shift"] == "mixed" and not afresh
        if not segments or (own != title and not across):
            title = own
            offset = end if afresh else 0
            segments.append(Segment(title, afresh, end, {}))
        end = offset + int(row["images"])
        if row[column]:
            segments[-1].lines.setdefault(_who(row), []).append((end, float(row[column])))
    for part in segments:
        part.lines.update((who, _smooth(points)) for who, points in part.lines.items())
    return segments


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The running mean of a segment, over a third of its batches at most, so that a short one is not flat."""
    width = max(1, min(WINDOW, len(points) // 3))
    values = [value for _, value in points]
    last = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [(seen, sum(part) / len(part)) for (seen, _), part in zip(points, last, strict=True)]


def _key(row: Row) -> tuple[str, str, str]:
    return row["classifier"], row["setting"], row["batch_size"]


def _who(row: Row) -> Who:
    return row["adapter"], row["guarded"] == "1"


def _shift(row: Row) -> tuple[str, str]:
    return row["shift"], row["severity"]


def _title(shift: tuple[str, str], severity: bool) -> str:
    name = shift[0].replace("_", " ")
    return f"{name} {shift[1]}" if severity and shift[1] != "0" else name


def _columns(shifts: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
    """Headings, with lines between clean images, corruptions and domains. A severity is named if there are several."""
    several = len({severity for _, severity in shifts if severity != "0"}) > 1
    kinds = [(shift == _CLEAN, shift[1] == "0") for shift in shifts]
    rules = [False, *(kind != last for last, kind in itertools.pairwise(kinds))]
    return [(_title(shift, several), rule) for shift, rule in zip(shifts, rules, strict=True)]


def _error(error: float | None, source: float | None) -> Cell:
    if error is None:
        return Cell("")
    share = 0.0 if source is None else max(-1.0, min(1.0, (error - source) / CLIP))
    strength = f"{abs(share) * STRONGEST:.2f}"
    colour = BETTER if share < 0 else WORSE
    return Cell(_percent(error), f"rgba({colour}, {strength})" if strength != "0.00" else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value * 100:.1f}"


def _points(value: float) -> str:
    return f"{value * 100:.1f} points"
