"""The comparison of all encoders: rows from the metrics files, and the same as CSV, text, Markdown and sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

from deepclust.config import Config, Count, Natural, Number, Share, Voters, config
from tasks.shared.operations.text import printable
from tasks.shared.outputs import layout, read

BASELINES = ("pixels", "random")
Row = dict[str, str | float | None]
_TITLES = {
    "acc": "k-means ACC",
    "nmi": "NMI",
    "ari": "ARI",
    "silhouette": "silhouette",
    "linear": "linear",
    "rankme": "RankMe",
    "clean": "clean error",
    "guard_worst": "worst guarded - source",
}
_ADAPTERS = ("source", "bn", "tsd")  # those with a column; the report has all


@config
class _Spread(Config):
    mean: Number
    std: Number


@config
class _Scores(Config):
    """Of one k."""

    inertia: _Spread
    sizes: list[Natural]
    silhouette: _Spread | None = None
    acc: _Spread | None = None
    nmi: _Spread | None = None
    ari: _Spread | None = None


# What a stage's metrics must have and may have, of what is read here.
_METRICS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pretrain": ({"method": str}, {}),
    "embed": ({"rankme": Number}, {}),
    "cluster": (
        {"k": Count},
        dict.fromkeys(("acc", "nmi", "ari", "silhouette"), _Spread) | {"other_k": dict[int, _Scores]},
    ),
    "linear": ({"labelled": Natural}, {"linear": Share, "all": dict[Voters, Share], "reason": str}),
    "adapt": (
        {"not_applicable": dict[str, str]},
        {
            "clean": Share | None,
            "errors": dict[str, Share],
            "guard": dict[Literal["worst", "worst_setting", "right"], Number | None],
            "reason": str,
        },
    ),
}


def title(column: str) -> str:
    """The heading of a column: `kNN 20` of `knn20`, `tsd error` of `error_tsd`."""
    if column.startswith("knn"):
        return f"kNN {column[3:]}"
    return f"{column[6:]} error" if column.startswith("error_") else _TITLES.get(column, column)


def stage_metrics(stage: str, encoder: str) -> dict[str, Any]:
    """A stage's metrics file. Raises: DataError if it is missing or damaged."""
    return read.record(layout.metrics(stage, encoder), *_METRICS[stage])


def collect(encoders: Sequence[str]) -> list[Row]:
    """One row an encoder, baselines first; what was not measured is None.

    Raises:
        DataError: If a stage has not run.
    """
    rows = [_row(encoder) for encoder in encoders]
    rows.sort(key=lambda row: BASELINES.index(str(row["method"])) if row["method"] in BASELINES else len(BASELINES))
    # An adapter may not apply to an encoder: all columns, in the order of the row that has most.
    names = dict.fromkeys(name for row in [*sorted(rows, key=len)[-1:], *rows] for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _row(encoder: str) -> Row:
    clusters = stage_metrics("cluster", encoder)
    linear = stage_metrics("linear", encoder)
    row: Row = {"encoder": encoder, "method": stage_metrics("pretrain", encoder)["method"], "k": clusters["k"]}
    for name in ("acc", "nmi", "ari", "silhouette"):
        score = clusters.get(name) or {}
        row |= {name: score.get("mean"), f"{name}_std": score.get("std")}
    row |= _neighbours(linear.get("all") or {})
    row |= {"linear": linear.get("linear"), "rankme": stage_metrics("embed", encoder).get("rankme")}
    adapted = stage_metrics("adapt", encoder)
    errors, guard = adapted.get("errors") or {}, adapted.get("guard") or {}
    row |= {"clean": adapted.get("clean")} | {f"error_{name}": errors[name] for name in _ADAPTERS if name in errors}
    return row | {"guard_worst": guard.get("worst_setting")}


def _neighbours(scores: Mapping[str, float]) -> Row:
    """kNN of every k at one temperature: the usual .07 where it was measured, else the first."""
    if not scores:
        return {"knn20": None, "knn200": None}
    chosen = "_t0.07" if any(key.endswith("_t0.07") for key in scores) else next(iter(scores))[1:].lstrip("0123456789")
    return {f"knn{key[1:].removesuffix(chosen)}": value for key, value in scores.items() if key.endswith(chosen)}


def table(path: Path = layout.COMPARISON) -> list[dict[str, str]]:
    """Rows of comparison.csv. Raises: DataError if it is missing or damaged."""
    return read.table(path, {"encoder": str, "method": str}, others=read.number)


def shown(row: Mapping[str, Any], column: str) -> str:
    """A cell as it is printed: `.646 ± .012`, or `.646` where there is no deviation; blank if absent."""
    value = row.get(column)
    if value is None or value == "":
        return ""
    if column in ("encoder", "method", "k"):
        return str(value)
    if column == "guard_worst":
        return f"{float(value):+.3f}"
    text = f"{float(value):.1f}" if column == "rankme" else _fraction(value)
    spread = row.get(f"{column}_std")
    return f"{text} ± {_fraction(spread)}" if spread not in (None, "") else text


def _fraction(value: Any) -> str:
    text = f"{float(value):.3f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns worth showing: no empty ones, no deviations (they stand beside their means), no repeated names."""
    names = [name for name in rows[0] if not name.endswith("_std")] if rows else []
    if all(row.get("method") == row["encoder"] for row in rows):
        names = [name for name in names if name != "method"]
    return [name for name in names if any(row.get(name) not in (None, "") for row in rows)]


def small_is_good(column: str) -> bool:
    """Whether the best value of a column is the smallest one."""
    return column in ("clean", "guard_worst") or column.startswith("error_")


def comparison_text(rows: Sequence[Mapping[str, Any]], width: int = 120) -> str:
    """The table for a terminal, in blocks of at most `width` characters; errors under shifts begin a block."""
    if not rows:
        return "no encoders"
    cells = {name: [title(name), *(shown(row, name) for row in rows)] for name in columns(rows)}
    widths = {name: max(map(len, column)) for name, column in cells.items()}
    head, *others = cells
    fits = sum(widths.values()) + 2 * len(others) <= width
    parts: list[list[str]] = [[head]]
    for name in others:
        full = sum(widths[each] + 2 for each in parts[-1]) + widths[name] > width
        if len(parts[-1]) > 1 and (full or (name == "clean" and not fits)):
            parts.append([head])
        parts[-1].append(name)
    return "\n\n".join(_underlined(aligned([*zip(*(cells[name] for name in names), strict=True)])) for names in parts)


def _underlined(table: str) -> str:
    head, _, rows = table.partition("\n")
    return f"{head}\n{'─' * len(head)}\n{rows}"


def aligned(table: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table as text, its first `words` columns aligned to the left and the others, numbers, to the right."""
    sides = ["left" if column < words else "right" for column in range(len(table[0]))]
    return str(tabulate(table, tablefmt="plain", colalign=sides, disable_numparse=True))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    names = columns(rows)
    lines = [[title(name) for name in names], ["---", *["---:"] * (len(names) - 1)]]
    lines += [[_literal(shown(row, name)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else "no encoders"


def _literal(cell: str) -> str:
    """A cell whose text is no Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&])", r"\\\1", printable(cell))


def verdict(rows: Sequence[Row]) -> list[str]:
    """In words, in which of ACC, NMI, kNN and linear accuracy a method beats the baselines, and in which not."""
    scores = [name for name in columns(rows) if name in ("acc", "nmi", "linear") or name.startswith("knn")]
    found = {str(row["method"]): row for row in rows if row["method"] in BASELINES}
    trained = [row for row in rows if row["method"] not in BASELINES]
    if not trained:
        return ["There are only baselines here."]
    if not scores:
        return ["No test image has a label: there are no accuracies, and you have to judge by the pictures."]
    sentences = [
        f"The baseline {name} is not in `encoders`: nothing is compared with it."
        for name in BASELINES
        if name not in found
    ]
    return sentences + [_judged(row, found, scores) for row in trained if found]


def _judged(row: Row, found: Mapping[str, Row], scores: Sequence[str]) -> str:
    """One method against the baselines, score by score."""
    won, lost = [], []
    for score in scores:
        measured = {name: base for name, base in found.items() if None not in (row.get(score), base.get(score))}
        ahead = {name: _number(row, score) - _number(base, score) for name, base in measured.items()}
        behind = [name for name, lead in ahead.items() if lead <= 0]
        if behind:
            against = " and ".join(f"{shown(found[name], score)} of {name}" for name in behind)
            lost.append(f"{title(score)} ({shown(row, score)} against {against})")
        elif ahead:
            spread = max(_number(each, f"{score}_std") for each in (row, *measured.values()))
            close = " (by less than the deviation over seeds)" if min(ahead.values()) <= spread and spread else ""
            won.append(title(score) + close)
    if not won and not lost:
        return f"{row['encoder']} has no score in common with the baselines."
    if not won:
        return f"{row['encoder']} does NOT beat the baselines in {_listed(lost)}: it is not working on this data."
    sentence = f"{row['encoder']} beats {_listed(list(found))} in {_listed(won)}"
    return f"{sentence}, but NOT in {_listed(lost)}." if lost else f"{sentence}."


def _number(row: Row, name: str) -> float:
    return float(row.get(name) or 0.0)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
