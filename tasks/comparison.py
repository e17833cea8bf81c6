"""The comparison table: its columns, its rows from the metrics files, its file and its text.

Reading and printing it needs nothing but the standard library.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepclust.errors import DataError
from tasks import layout

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
}


def title(column: str) -> str:
    """A column as a heading: `knn20` is `kNN 20`, `error_tsd` is `tsd error`."""
    if column.startswith("knn"):
        return f"kNN {column[3:]}"
    return f"{column[6:]} error" if column.startswith("error_") else _TITLES.get(column, column)


def stage_metrics(stage: str, encoder: str) -> dict[str, Any]:
    """A stage's metrics file. Raises: DataError if it is missing."""
    path = layout.metrics(stage, encoder)
    if not path.exists():
        raise DataError(f"expected metrics in {path}, found none; run `dvc repro {stage}@{encoder}`")
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def collect(encoders: Sequence[str]) -> list[Row]:
    """One row an encoder, baselines first; what was not measured is None.

    Raises:
        DataError: If a stage has not run.
    """
    rows = [_row(encoder) for encoder in encoders]
    rows.sort(key=lambda row: BASELINES.index(str(row["method"])) if row["method"] in BASELINES else len(BASELINES))
    # Every row has the columns of all, in the order of the row that has most: an adapter may not apply to an encoder.
    columns = sorted((list(row) for row in rows), key=len)[-1:] + [list(row) for row in rows]
    names = list(dict.fromkeys(name for each in columns for name in each))
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
    return row | {"clean": adapted.get("clean")} | {f"error_{k}": v for k, v in (adapted.get("error") or {}).items()}


def _neighbours(scores: Mapping[str, float]) -> Row:
    """kNN of every k at one temperature: .07, the field's own, where it was measured."""
    if not scores:
        return {"knn20": None, "knn200": None}
    temperatures = [key.partition("_t")[2] for key in scores]
    chosen = "0.07" if "0.07" in temperatures else temperatures[0]
    return {
        f"knn{key.partition('_t')[0][1:]}": value for key, value in scores.items() if key.partition("_t")[2] == chosen
    }


def read(path: Path = layout.COMPARISON) -> list[dict[str, str]]:
    """Rows of comparison.csv. Raises: DataError if there is none."""
    if not path.exists():
        raise DataError(f"expected the comparison in {path}, found none; run `dvc repro report`")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def shown(row: Mapping[str, Any], column: str) -> str:
    """A cell as it is printed: three decimals, with the standard deviation where there is one; blank if absent."""
    value = row.get(column)
    if value is None or value == "":
        return ""
    if column in ("encoder", "method", "k"):
        return str(value)
    text = f"{float(value):.1f}" if column == "rankme" else f"{float(value):.3f}"
    spread = row.get(f"{column}_std")
    return f"{text} ± {float(spread):.3f}" if spread not in (None, "") else text


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns worth showing: no empty ones, no deviations (they stand beside their means), no repeated names."""
    names = [name for name in rows[0] if not name.endswith("_std")] if rows else []
    if all(row["method"] == row["encoder"] for row in rows):
        names = [name for name in names if name != "method"]
    return [name for name in names if any(row[name] not in (None, "") for row in rows)]


def comparison_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal."""
    names = columns(rows)
    cells = [[title(name) for name in names], *([shown(row, name) for name in names] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(names))]
    lines = [
        "  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in aligned).rstrip()
        for aligned in (list(enumerate(zip(line, widths, strict=True))) for line in cells)
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]]) if rows else "no encoders"


def verdict(rows: Sequence[Row]) -> list[str]:
    """In words, which method beats the baselines in kNN and linear accuracy, and which does not."""
    scores = [name for name in columns(rows) if name.startswith("knn") or name == "linear"]
    found = {str(row["method"]): row for row in rows if row["method"] in BASELINES}
    trained = [row for row in rows if row["method"] not in BASELINES]
    if not trained:
        return ["There are only baselines here."]
    if not scores:
        return ["No test image has a label: accuracies are absent, and whether a method works is for the eye to tell."]
    sentences = [
        f"The baseline {name} is not in `encoders`: nothing is compared with it."
        for name in BASELINES
        if name not in found
    ]
    for row in trained:
        lost = [
            f"{name} in {title(score)} ({shown(row, score)} against {shown(base, score)})"
            for name, base in found.items()
            for score in scores
            if row[score] is not None and base[score] is not None and float(row[score]) <= float(base[score])  # type: ignore[arg-type]
        ]
        if lost:
            sentences.append(f"{row['encoder']} does NOT beat {', nor '.join(lost)}: it is not working on this data.")
        elif found:
            sentences.append(f"{row['encoder']} beats {' and '.join(found)} in kNN and linear accuracy.")
    return sentences
