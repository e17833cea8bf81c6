"""The comparison of all encoders: rows from the metrics files, and the same as CSV, text, Markdown and sentences."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

from deepclust.config import Config, Count, Natural, Number, Share, Side, Voters, config
from tasks.report.intervals import wilson
from tasks.shared.operations import costs
from tasks.shared.operations.text import printable
from tasks.shared.outputs import layout, prepared, read

BASELINES = ("pixels", "random")
KINDS = ("baseline", "from scratch", "pretrained")
Row = Mapping[str, str | float | None]
# The first table: what an encoder is worth, and what it costs. Of the two label-free columns only one is in it.
_FIRST = ("encoder", "kind", "acc", "nmi", "knn20", "linear", "heldout", "stability")
COSTS = ("minutes", "images_per_second")  # clock readings: in no output
_PRICE = ("dim", "image_size", "megabytes", *COSTS)
_TITLES = {
    "acc": "cluster ACC",
    "nmi": "NMI",
    "ari": "ARI",
    "silhouette": "silhouette",
    "linear": "linear",
    "rankme": "RankMe",
    "clean": "clean error",
    "guard_worst": "worst guarded - source",
    "heldout": "kNN held out",
    "image_size": "side",
    "megabytes": "MB",
    "minutes": "minutes",
    "images_per_second": "images/s",
}
_ADAPTERS = ("source", "bn", "tsd")  # those with a column; the report has all


@config
class _Spread(Config):
    mean: Number
    std: Number


@config
class _Cut(Config):
    """Of one cut of the tree."""

    sizes: list[Natural]
    acc: _Spread | None = None
    nmi: _Spread | None = None
    ari: _Spread | None = None


@config
class _Algorithm(Config):
    """Of one clustering algorithm."""

    information: _Spread
    silhouette: _Spread | None = None
    acc: _Spread | None = None
    nmi: _Spread | None = None
    ari: _Spread | None = None
    stability: _Spread | None = None


@config
class _Estimate(Config):
    """How many clusters there are."""

    k: Count
    sure: Share
    interval: tuple[Count, Count]
    edge: Literal["", "least", "most"]
    reason: str
    runners_up: list[Count]


@config
class _Copies(Config):
    """Groups of copies, and the images in them."""

    groups: Natural
    images: Natural


@config
class _Inspection(Config):
    """What else is in the data."""

    copies: dict[Literal["train", "test", "between"], _Copies]
    train: dict[str, Natural]
    test: dict[str, Natural]


# What a stage's metrics must have and may have, of what is read here.
_METRICS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pretrain": ({"method": str}, {}),
    "embed": ({"dim": Count, "rankme": Number}, {}),
    "cluster": (
        {
            "k": Count,
            "algorithm": str,
            "algorithms": dict[str, _Algorithm],
            "other_k": dict[int, _Cut],
            "rejected": dict[Literal["train", "test"], Natural],
            "inspection": _Inspection,
        },
        dict.fromkeys(("acc", "nmi", "ari", "silhouette", "stability"), _Spread)
        | {"coverage": dict[float, Share], "estimate": _Estimate},
    ),
    "linear": (
        {"labelled": Natural},
        {"linear": Share, "knn_heldout": Share, "all": dict[Voters, Share], "reason": str},
    ),
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
    """One row an encoder, baselines first and pretrained ones last; what was not measured is None.

    Raises:
        DataError: If a stage has not run.
    """
    heldout = len(prepared.heldout())
    rows = [_row(encoder, heldout) for encoder in encoders]
    rows.sort(key=lambda row: (KINDS.index(str(row["kind"])), [name != row["method"] for name in BASELINES]))
    # An adapter may not apply to an encoder: all columns, in the order of the row that has most.
    names = dict.fromkeys(name for row in [*sorted(rows, key=len)[-1:], *rows] for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _row(encoder: str, heldout: int) -> Row:
    clusters = stage_metrics("cluster", encoder)
    linear = stage_metrics("linear", encoder)
    embedded = stage_metrics("embed", encoder)
    method = stage_metrics("pretrain", encoder)["method"]
    row: dict[str, str | float | None] = {"encoder": encoder, "method": method, "kind": kind(method)}
    row |= {"k": clusters["k"], "algorithm": clusters["algorithm"]}
    # That of one algorithm, where it was fitted: spectral clustering agrees with itself whatever the encoder is worth.
    of = {"stability": clusters["algorithms"].get("kmeans", clusters)}
    for name in ("acc", "nmi", "ari", "silhouette", "stability"):
        score = of.get(name, clusters).get(name) or {}
        row |= {name: score.get("mean"), f"{name}_std": score.get("std")}
    row |= _neighbours(linear.get("all") or {})
    row |= {"linear": linear.get("linear"), "rankme": embedded["rankme"]}
    accuracy = linear.get("knn_heldout")
    row |= {"heldout": accuracy, "heldout_images": None if accuracy is None else heldout}
    row |= {"dim": embedded["dim"], **_size(encoder)}
    adapted = stage_metrics("adapt", encoder)
    errors, guard = adapted.get("errors") or {}, adapted.get("guard") or {}
    row |= {"clean": adapted.get("clean")} | {f"error_{name}": errors[name] for name in _ADAPTERS if name in errors}
    return row | {"guard_worst": guard.get("worst_setting")}


def kind(method: str) -> str:
    """Whether a method is a baseline, trains from scratch, or takes weights that others have trained."""
    if method in BASELINES:
        return "baseline"
    return "pretrained" if method == "pretrained" else "from scratch"


def _size(encoder: str) -> dict[str, float]:
    """Side of the images that the network sees, in pixels, and size of its weights in 10⁶ bytes."""
    folder = layout.out("pretrain", encoder)
    stated = read.record(folder / "encoder.json", {"image_size": Side, "input_size": Side | None})
    size = read.there(folder / "encoder.safetensors").stat().st_size
    return {"image_size": stated["input_size"] or stated["image_size"], "megabytes": size / 1e6}


def with_costs(rows: Sequence[Row]) -> list[Row]:
    """Rows with minutes of training and images embedded in a second; None where these are not known."""
    return [row | _costs(str(row["encoder"])) for row in map(dict, rows)]


def _costs(encoder: str) -> dict[str, str | float | None]:
    trained, embedded = (costs.reading(stage, encoder) or {} for stage in ("pretrain", "embed"))
    seconds, speed = trained.get("seconds"), None
    if embedded.get("embedding_seconds"):
        speed = embedded.get("images", 0) / embedded["embedding_seconds"]
    return dict(zip(COSTS, (None if seconds is None else seconds / 60, speed), strict=True))


def _neighbours(scores: Mapping[str, float]) -> dict[str, float | None]:
    """kNN of every k at one temperature: the usual .07 where it was measured, else the first."""
    if not scores:
        return {"knn20": None, "knn200": None}
    chosen = "_t0.07" if any(key.endswith("_t0.07") for key in scores) else next(iter(scores))[1:].lstrip("0123456789")
    return {f"knn{key[1:].removesuffix(chosen)}": value for key, value in scores.items() if key.endswith(chosen)}


def table(path: Path = layout.COMPARISON) -> list[dict[str, str]]:
    """Rows of comparison.csv. Raises: DataError if it is missing or damaged."""
    return read.table(path, {"encoder": str, "method": str, "kind": str, "algorithm": str}, others=read.number)


def number(row: Mapping[str, Any], column: str) -> float | None:
    """A finite number of a row, or None."""
    value = row.get(column)
    return None if value in (None, "") or not math.isfinite(float(value)) else float(value)


def shown(row: Mapping[str, Any], column: str) -> str:
    """A cell as it is printed: `.646 ± .012`, or `.646` where there is no deviation; blank if absent."""
    value = row.get(column)
    if value is None or value == "":
        return "–" if column in COSTS else ""
    if column in ("encoder", "method", "kind", "k", "algorithm", "dim", "image_size"):
        return str(value)
    if column == "guard_worst":
        return f"{float(value):+.3f}"
    if column in ("rankme", "megabytes", "minutes"):
        return f"{float(value):,.1f}"
    if column == "images_per_second":
        return f"{float(value):,.0f}"
    if column == "heldout" and (images := number(row, "heldout_images")):
        interval = wilson(float(value), int(images))
        return f"{fraction(value)} ({fraction(interval.low)}–{fraction(interval.high)})"
    spread = row.get(f"{column}_std")
    return f"{fraction(value)} ± {fraction(spread)}" if spread not in (None, "") else fraction(value)


def fraction(value: Any) -> str:
    """A number with three decimals and no leading zero."""
    text = f"{float(value):.3f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns worth showing: no empty ones but costs, no deviations or counts that others show, no repeated names."""
    names = [name for name in rows[0] if not name.endswith("_std") and name != "heldout_images"] if rows else []
    if all(row.get("method") == row["encoder"] for row in rows):
        names = [name for name in names if name != "method"]
    return [name for name in names if name in COSTS or any(row.get(name) not in (None, "") for row in rows)]


def tables(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Columns of the first table, which says what an encoder is worth and costs, and of that with all other numbers."""
    names = columns(rows)
    knn = next((name for name in ("knn20", *names) if name.startswith("knn") and name in names), "")
    label_free = "heldout" if "heldout" in names else "stability"
    wanted = (*_FIRST[:4], knn, "linear", label_free, *_PRICE)
    first = [name for name in wanted if name in names]
    return first, ["encoder", *(name for name in names if name not in first)]


def small_is_good(column: str) -> bool:
    """Whether the best value of a column is the smallest one."""
    return column in ("clean", "guard_worst") or column.startswith("error_")


def comparison_text(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> str:
    """Both tables for a terminal, in blocks of at most `width` characters, by default the terminal's, or 120.

    Where a table does not fit, the held-out accuracy with the costs, and the errors under shifts, begin a block.
    """
    if not rows:
        return "no encoders"
    width = width or shutil.get_terminal_size((120, 24)).columns
    blocks = [block for names in tables(rows) if len(names) > 1 for block in _blocks(rows, names, width)]
    return "\n\n".join(blocks)


def _blocks(rows: Sequence[Mapping[str, Any]], names: Sequence[str], width: int) -> list[str]:
    cells = {name: [title(name), *(shown(row, name) for row in rows)] for name in names}
    widths = {name: max(map(len, column)) for name, column in cells.items()}
    head, *others = names
    fits = sum(widths.values()) + 2 * len(others) <= width
    parts: list[list[str]] = [[head]]
    for name in others:
        full = sum(widths[each] + 2 for each in parts[-1]) + widths[name] > width
        if len(parts[-1]) > 1 and (full or (name in ("heldout", "clean") and not fits)):
            parts.append([head])
        parts[-1].append(name)
    return [
        _underlined(
            aligned([*zip(*(cells[name] for name in part), strict=True)], words=2 if part[1:2] == ["kind"] else 1)
        )
        for part in parts
    ]


def _underlined(table: str) -> str:
    head, _, rows = table.partition("\n")
    return f"{head}\n{'─' * len(head)}\n{rows}"


def aligned(table: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table as text, its first `words` columns aligned to the left and the others, numbers, to the right."""
    sides = ["left" if column < words else "right" for column in range(len(table[0]))]
    return str(tabulate(table, tablefmt="plain", colalign=sides, disable_numparse=True))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Both tables in Markdown."""
    return "\n\n".join(_markdown(rows, names) for names in tables(rows) if len(names) > 1) if rows else "no encoders"


def _markdown(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    lines = [[title(name) for name in names], ["---", *["---:"] * (len(names) - 1)]]
    lines += [[literal(shown(row, name)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def literal(cell: str) -> str:
    """A cell whose text is no Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&])", r"\\\1", printable(cell))
