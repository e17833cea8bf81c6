"""Adapt: an encoder's classifiers on shifted test images, every adapter beside the source model and `bn`.

    python -m tasks.adapt ENCODER

Every adapter meets the same streams (`adaptation.shifts`), once as it is and once with a guard. Without labels
there is no error to measure: predictions and label-free indicators are written all the same.
"""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust import seeding
from deepclust.adaptation import measuring, shifts
from deepclust.adaptation.base import AdapterConfig
from deepclust.adaptation.normalisation import align_statistics
from deepclust.models.devices import default_device
from deepclust.models.features import to_float
from tasks.adapt import classifiers, domains
from tasks.shared.operations.params import schema
from tasks.shared.outputs import prepared, stage

SOURCE_IMAGES = 1024  # training images, without their labels, that tell statistics and confidence without a shift
SOURCE_BATCH = 256
PREDICTIONS = [
    *("classifier", "setting", "batch_size", "shift", "path", "adapter", "guarded", "prediction", "confidence")
]
SECONDS = ["classifier", "setting", "batch_size", "adapter", "guarded", "seconds_per_image"]
Rows = list[dict[str, Any]]


class LongTable:
    """A table that grows with the images, so is written stream by stream and never held.

    Args:
        file: Where it is written.
        columns: Its columns.
    """

    def __init__(self, file: Path, columns: list[str]) -> None:
        self._file, self._columns = file, columns
        self._unsettled = file.with_name(f"{file.name}.unsettled")
        stage.write_text(file, stage.table([], columns))
        self._unsettled.touch()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows of a setting that goes on."""
        with self._unsettled.open("a", encoding="utf-8", newline="") as out:
            out.write(stage.table(rows, self._columns).split("\n", 1)[1])

    def settle(self, failed: Collection[str]) -> None:
        """Take over the setting's rows, except those of adapters that failed on one of its streams."""
        with (
            self._unsettled.open(encoding="utf-8", newline="") as rows,
            self._file.open("a", encoding="utf-8", newline="") as out,
        ):
            whole = (row for row in csv.DictReader(rows, self._columns) if counts(row, failed))
            csv.DictWriter(out, self._columns, lineterminator="\n").writerows(whole)
        self._unsettled.write_bytes(b"")

    def close(self) -> None:
        """Remove what is not part of the table."""
        self._unsettled.unlink()


def counts(row: Mapping[str, Any], failed: Collection[str]) -> bool:
    """Whether a row is kept: an adapter that fails on one stream is measured on none, so that means are comparable."""
    return bool(int(row["guarded"])) or row["adapter"] not in failed


def main() -> None:
    """Measure the adapters of one encoder."""
    with stage.running("adapt") as here:
        assert here.encoder
        values = here.params.adapt
        work = here.folder / "shifts"
        work.mkdir()
        met = list(collect(here.params, work))
        source_images = list(source_batches(here.params.seed))
        tables: dict[str, Rows] = {"table": [], "seconds": []}
        long_tables = open_tables(here.folder)
        not_applicable: dict[str, str] = {}
        for kind in values.classifiers:
            found = classifiers.build(kind, here.encoder, here.params, source_images)
            if found.model is None:
                print(f"{kind}: not applicable: {found.reason}", flush=True)
                not_applicable[kind] = found.reason
                continue
            several = f"{kind}: " if len(values.classifiers) > 1 else ""
            parts, reasons = run(found, kind, met, source_images, values, long_tables, seed=here.params.seed)
            not_applicable |= {f"{several}{name}": reason for name, reason in reasons.items()}
            for name, rows in parts.items():
                tables[name] += rows
        for table in long_tables.values():
            table.close()
        shutil.rmtree(work)
        none_applies = not_applicable.keys() >= set(values.classifiers)
        here.metrics(summary(tables["table"], not_applicable, met[0], none_applies=none_applies))
        here.run.log_metrics(
            {
                f"seconds_per_image.{row['classifier']}.{row['setting']}.{row['batch_size']}."
                f"{'guarded_' if row['guarded'] else ''}{row['adapter']}": row["seconds_per_image"]
                for row in tables["seconds"]
            }
        )
        write(here, tables)


def write(here: stage.Here, tables: Mapping[str, Rows]) -> None:
    """The short tables as files."""
    stage.write_text(here.folder / "table.csv", stage.table(tables["table"], measuring.COLUMNS))
    stage.write_text(here.folder / "seconds.csv", stage.table(tables["seconds"], SECONDS))
    here.curve(tables["table"], measuring.COLUMNS)


def open_tables(folder: Path) -> dict[str, LongTable]:
    """The long tables, by name."""
    columns = {"stream": measuring.CURVE, "predictions": PREDICTIONS}
    return {name: LongTable(folder / f"{name}.csv", columns[name]) for name in columns}


def collect(values: schema.Params, work: Path) -> Iterator[shifts.Shift]:
    """All shifts, `clean` first; corrupted images and those of domains are kept in the folder `work`."""
    options, seed = values.adapt, values.seed
    test = prepared.load("test")
    rows = shifts.choose(test.labels, count=options.images, seed=seed)
    if len(rows) < options.images:
        print(f"adapt.images {options.images}: there are {len(rows)} test images to choose from, all are used")
    clean = shifts.Shift(*shifts.CLEAN, test.images[rows], test.labels[rows], [test.paths[row] for row in rows])
    yield clean
    for corruption in options.corruptions:
        for severity in options.severities:
            yield shifts.corrupted(clean, corruption, severity, seed=seed, file=work / f"{corruption}-{severity}")
    (work / "domains").mkdir()
    yield from domains.load(
        Path(options.domains),
        work / "domains",
        classes=prepared.meta()["classes"],
        statistics=prepared.statistics(),
        count=options.images,
        max_pixels=values.data.max_pixels,
        seed=seed,
    )


def source_batches(seed: int) -> Iterator[Tensor]:
    """Batches (B, C, H, W) in [0, 1] of training images, a seeded choice."""
    images = prepared.images("train")
    order = torch.randperm(len(images), generator=seeding.generator("adapt", seed, "source"))[:SOURCE_IMAGES]
    for rows in torch.split(order, SOURCE_BATCH):
        yield to_float(torch.from_numpy(images[np.sort(rows.numpy())])).to(default_device())


def run(
    found: classifiers.Found,
    kind: str,
    met: Sequence[shifts.Shift],
    source_images: Sequence[Tensor],
    values: schema.Adapt,
    long_tables: Mapping[str, LongTable],
    *,
    seed: int,
) -> tuple[dict[str, Rows], dict[str, str]]:
    """Every adapter in every setting.

    Args:
        found: The classifier; its BatchNorm is aligned in place if the parameters say so.
        kind: What it is.
        met: All shifts.
        source_images: Batches of training images.
        values: Parameters of the stage.
        long_tables: Where rows of `stream` and `predictions` go.
        seed: Draws the orders.

    Returns:
        Rows by name of the table (table, seconds), and why adapters do not apply.
    """
    assert found.model is not None
    if values.align:
        align_statistics(found.model, source_images)
    adapters = measuring.make(found.model, options_of(values), source_images, guard=values.guard)
    not_applicable = dict(adapters.not_applicable)
    parts: dict[str, Rows] = {"table": [], "seconds": []}
    for setting in values.settings:
        for batch_size in values.batch_sizes:
            begin = time.perf_counter()
            where = {"classifier": kind, "setting": setting, "batch_size": batch_size}
            made, failed = _setting(adapters, found, met, where, long_tables, seed=seed)
            not_applicable |= {f"{name}, {setting}, batches of {batch_size}": why for name, why in failed.items()}
            for name, rows in made.items():
                parts[name] += rows
            print(f"\n{kind}, {setting}, batches of {batch_size}: {time.perf_counter() - begin:.0f} s", flush=True)
            print(show(made["table"], made["seconds"]), flush=True)
    for name, reason in not_applicable.items():
        print(f"{name}: not applicable: {reason}", flush=True)
    return parts, not_applicable


def options_of(values: schema.Adapt) -> dict[str, AdapterConfig]:
    """Options of each adapter that the parameters name."""
    return {name: values.adapter(name) for name in values.adapters}


def _setting(
    adapters: measuring.Adapters,
    found: classifiers.Found,
    met: Sequence[shifts.Shift],
    where: dict[str, Any],
    long_tables: Mapping[str, LongTable],
    *,
    seed: int,
) -> tuple[dict[str, Rows], dict[str, str]]:
    """All streams of one setting."""
    table: Rows = []
    clusters = where["classifier"] == "clusters"
    reasons: dict[str, str] = {}
    seconds: dict[tuple[str, bool], list[float]] = {}
    for stream in shifts.streams(met, where["setting"], batch_size=where["batch_size"], seed=seed):
        answers, failed = measuring.follow(adapters, met, stream, default_device())
        reasons |= failed
        table += [where | row for row in measuring.tabulate(answers, met, stream, clusters=clusters)]
        long_tables["stream"].add(where | row for row in measuring.curve(answers, met, stream, clusters=clusters))
        long_tables["predictions"].add(where | row for row in _predictions(answers, met, stream, found.names))
        for key, each in answers.items():
            seconds.setdefault(key, []).append(each.seconds / len(stream.shift))
    cost = [
        where | {"adapter": name, "guarded": int(guarded), "seconds_per_image": float(np.mean(found))}
        for (name, guarded), found in seconds.items()
    ]
    for long_table in long_tables.values():
        long_table.settle(reasons)
    parts = {"table": table, "seconds": cost}
    return {name: [row for row in rows if counts(row, reasons)] for name, rows in parts.items()}, reasons


def _predictions(
    answers: Mapping[tuple[str, bool], measuring.Answers],
    met: Sequence[shifts.Shift],
    stream: shifts.Stream,
    names: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """One row an adapter and image without a label: there they are all that can be had."""
    for (name, guarded), found in answers.items():
        for place, (index, image) in enumerate(zip(stream.shift.tolist(), stream.image.tolist(), strict=True)):
            shift = met[index]
            if shift.labels[image] < 0:
                yield {
                    "shift": shift.title,
                    "path": shift.paths[image],
                    "adapter": name,
                    "guarded": int(guarded),
                    "prediction": names[found.classes[place]],
                    "confidence": float(found.confidence[place]),
                }


def summary(table: Rows, not_applicable: dict[str, str], clean: shifts.Shift, *, none_applies: bool) -> dict[str, Any]:
    """The stage's metrics. `errors` and `guarded` are means over all shifts of the first classifier and setting.

    Args:
        table: All rows.
        not_applicable: Why classifiers and adapters do not apply.
        clean: The images without a shift.
        none_applies: Whether there was no classifier.
    """
    labelled = int((clean.labels >= 0).sum())
    metrics: dict[str, Any] = {"images": len(clean.labels), "labelled": labelled, "not_applicable": not_applicable}
    measured = [row for row in table if "error" in row]
    if not measured:
        return metrics | {"reason": "no classifier applies" if none_applies else "no labelled test images"}
    first = {key: measured[0][key] for key in ("classifier", "setting", "batch_size")}
    own = [row for row in measured if first.items() <= row.items()]
    metrics |= first
    metrics["clean"] = next(
        (row["error"] for row in own if (row["shift"], row["severity"]) == shifts.CLEAN and row["adapter"] == "source"),
        None,
    )
    settings: dict[str, dict[str, float]] = {}
    for row in measured:
        if (row["shift"], row["severity"]) != shifts.CLEAN:
            settings.setdefault(_key(row), {})
    for key, means in settings.items():
        means |= mean_errors([row for row in measured if _key(row) == key])
    first_means = settings.get(_key(first), {})
    metrics["errors"] = {name: value for name, value in first_means.items() if not name.startswith("guarded ")}
    metrics["guarded"] = {
        name.removeprefix("guarded "): value for name, value in first_means.items() if name.startswith("guarded ")
    }
    metrics["settings"] = settings
    guarded = [row for row in measured if row["guarded"]]
    if guarded:
        metrics["guard"] = {
            "worst": max(row["minus_source"] for row in guarded),
            "worst_setting": max(
                value - means["source"]
                for means in settings.values()
                for name, value in means.items()
                if name.startswith("guarded ")
            )
            if settings
            else None,
            "right": _weighted([row for row in guarded if "guard_right" in row], "guard_right"),
        }
    return metrics


def _key(row: Mapping[str, Any]) -> str:
    """Classifier, setting and batch size in one word; MLflow allows no commas in the name of a metric."""
    return f"{row['classifier']}/{row['setting']}/{row['batch_size']}"


def mean_errors(rows: Rows) -> dict[str, float]:
    """Mean error over the shifts of each adapter, `clean` left out; the guarded ones as `guarded NAME`."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row["shift"], row["severity"]) != shifts.CLEAN and "error" in row:
            found.setdefault(f"{'guarded ' if row['guarded'] else ''}{row['adapter']}", []).append(row["error"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def _weighted(rows: Rows, name: str) -> float | None:
    images = sum(row["images"] for row in rows)
    return sum(row[name] * row["images"] for row in rows) / images if images else None


def show(table: Rows, seconds: Rows) -> str:
    """One line an adapter: mean error over the shifts, guarded beside it, the worst shift, milliseconds an image."""
    means = mean_errors(table)
    cost = {(row["adapter"], row["guarded"]): row["seconds_per_image"] * 1000 for row in seconds}
    lines = [f"{'adapter':14}{'error':>8}{'guarded':>9}{'- source':>10}{'worst':>8}{'ms':>8}"]
    for name in dict.fromkeys(row["adapter"] for row in table):
        own = [row["minus_source"] for row in table if row["adapter"] == name and not row["guarded"] and "error" in row]
        worst = f"{max(own):+.3f}" if own else ""
        both = [means.get(name), means.get(f"guarded {name}")]
        ahead = f"{means[name] - means['source']:+.3f}" if name in means else ""
        cells = [f"{value:.4f}" if value is not None else "" for value in both]
        lines.append(f"{name:14}{cells[0]:>8}{cells[1]:>9}{ahead:>10}{worst:>8}{cost.get((name, 0), np.nan):8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
