"""Measure adapters: an encoder's classifiers on shifted test images, with every adapter of the parameters.

    python -m tasks.adapt ENCODER

Every adapter meets the same streams (`adaptation.shifts`), with and without a guard. Where images have no labels there
are no errors, but predictions, and indicators that need no labels.
"""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepclust import seeding
from deepclust.adaptation import measuring, shifts
from deepclust.adaptation.base import AdapterConfig
from deepclust.adaptation.normalisation import align_statistics
from deepclust.models import cost
from deepclust.models import encoder as encoders
from deepclust.models.devices import default_device
from deepclust.models.features import to_float
from tasks.adapt import budget, classifiers, domains
from tasks.shared.operations.params import schema
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout, prepared, stage, tables

SOURCE_BATCH = 256
PREDICTIONS = [
    *("classifier", "setting", "batch_size", "shift", "path", "adapter", "guarded", "prediction", "confidence")
]
Rows = list[dict[str, Any]]


class LongTable:
    """A table with a row for each image or batch: written stream by stream, and never held in memory.

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
        """Write rows of a setting that is not finished."""
        with self._unsettled.open("a", encoding="utf-8", newline="") as out:
            out.write(stage.table(rows, self._columns).split("\n", 1)[1])

    def settle(self, failed: Collection[str]) -> None:
        """Take over the setting's rows, except those of adapters that failed on one of its streams."""
        with (
            self._unsettled.open(encoding="utf-8", newline="") as rows,
            self._file.open("a", encoding="utf-8", newline="") as out,
        ):
            whole = (row for row in csv.DictReader(rows, self._columns) if counts(row, failed))
            tables.Writer(out, self._columns).add(whole)
        self._unsettled.write_bytes(b"")

    def close(self) -> None:
        """Remove the temporary file."""
        self._unsettled.unlink()


def counts(row: Mapping[str, Any], failed: Collection[str]) -> bool:
    """Whether a row is kept: an adapter that fails on one stream is left out of all, so that means are comparable."""
    return bool(int(row["guarded"])) or row["adapter"] not in failed


def main() -> None:
    """Measure the adapters of one encoder."""
    with stage.running("adapt") as here:
        assert here.encoder
        values = here.params.adapt
        planned = plan(here.encoder, values)
        if planned.reason:
            nothing_measured(here, planned)
            return
        say(f"at most {planned.images} test images of each shift: about {planned.minutes:.1f} minutes of one core")
        here.run.log_params({"auto.images": planned.images, "auto.minutes": round(planned.minutes, 2)})
        work = here.folder / "shifts"
        work.mkdir()
        met = list(collect(here.params, here.encoder, planned.images, work))
        source_images = list(source_batches(here.params.seed, here.encoder))
        columns = {"stream": measuring.CURVE, "predictions": PREDICTIONS}
        long_tables = {name: LongTable(here.folder / f"{name}.csv", columns[name]) for name in columns}
        table: Rows = []
        seconds: Rows = []
        not_applicable: dict[str, str] = {}
        for kind in values.classifiers:
            found = classifiers.build(kind, here.encoder, here.params, source_images)
            if found.model is None:
                say(f"{kind}: not applicable: {found.reason}")
                not_applicable[kind] = found.reason
                continue
            several = f"{kind}: " if len(values.classifiers) > 1 else ""
            measured = run(found, kind, met, source_images, values, long_tables, seed=here.params.seed)
            table += measured.table
            seconds += measured.seconds
            not_applicable |= {f"{several}{name}": reason for name, reason in measured.not_applicable.items()}
        for long_table in long_tables.values():
            long_table.close()
        shutil.rmtree(work)
        none_applies = not_applicable.keys() >= set(values.classifiers)
        here.metrics(summary(table, not_applicable, met[0], none_applies=none_applies))
        here.run.log_metrics(
            {
                f"seconds_per_image.{row['classifier']}.{row['setting']}.{row['batch_size']}."
                f"{'guarded_' if row['guarded'] else ''}{row['adapter']}": row["seconds_per_image"]
                for row in seconds
            }
        )
        stage.write_text(here.folder / "table.csv", stage.table(table, measuring.COLUMNS))
        here.curve(table, measuring.COLUMNS)


def plan(encoder: str, values: schema.Adapt) -> budget.Plan:
    """How many images the encoder is measured on, or why it is not."""
    network = encoders.load(layout.out("pretrain", encoder))
    size, channels = (network.description[name] for name in ("image_size", "channels"))
    test, train = (prepared.labels(split) for split in ("test", "train"))
    labelled = int((test >= 0).sum())
    data = budget.Data(
        test=labelled or len(test),
        train=len(train),
        labelled=int((train >= 0).sum()),
        domains=budget.domain_sizes(Path(values.domains)),
    )
    return budget.plan(encoder, cost.of(network, (channels, size, size)), data, values)


def nothing_measured(here: stage.Here, planned: budget.Plan) -> None:
    """Say why, and write tables without rows."""
    say(f"not measured: {planned.reason}")
    for name, columns in (("table", measuring.COLUMNS), ("stream", measuring.CURVE), ("predictions", PREDICTIONS)):
        stage.write_text(here.folder / f"{name}.csv", stage.table([], columns))
    here.metrics({"images": 0, "labelled": 0, "not_applicable": {}, "reason": planned.reason})
    here.curve([], measuring.COLUMNS)


def collect(values: schema.Params, encoder: str, count: int, work: Path) -> Iterator[shifts.Shift]:
    """All shifts with at most `count` images each, `clean` first; but for these, kept in files in the folder `work`."""
    options, seed = values.adapt, values.seed
    test = prepared.load("test", encoder)
    rows = shifts.choose(test.labels, count=count, seed=seed)
    if options.images != "auto" and len(rows) < options.images:
        say(f"adapt.images {options.images}: there are {len(rows)} test images to choose from, all are used")
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
        reading=domains.reading(encoder),
        image_size=clean.images.shape[1],
        channels=clean.images.shape[3],
        count=count,
        max_pixels=values.data.max_pixels,
        follow_links=values.data.follow_links,
        seed=seed,
    )


def source_batches(seed: int, encoder: str) -> Iterator[Tensor]:
    """Batches (B, C, H, W) in [0, 1] of training images, a seeded choice."""
    images = prepared.images("train", encoder)
    order = torch.randperm(len(images), generator=seeding.generator("adapt", seed, "source"))[: budget.SOURCE_IMAGES]
    for rows in torch.split(order, SOURCE_BATCH):
        yield to_float(torch.from_numpy(images[np.sort(rows.numpy())])).to(default_device())


class Measured(NamedTuple):
    """Rows of table.csv, the seconds an image of each adapter, and why adapters do not apply."""

    table: Rows
    seconds: Rows
    not_applicable: dict[str, str]


def run(
    found: classifiers.Found,
    kind: str,
    met: Sequence[shifts.Shift],
    source_images: Sequence[Tensor],
    values: schema.Adapt,
    long_tables: Mapping[str, LongTable],
    *,
    seed: int,
) -> Measured:
    """Every adapter in every setting.

    Args:
        found: The classifier; its BatchNorm is aligned in place if the parameters say so.
        kind: Its name.
        met: All shifts.
        source_images: Batches of training images.
        values: Parameters of the stage.
        long_tables: Where rows of `stream` and `predictions` go.
        seed: Draws the orders.
    """
    assert found.model is not None
    if values.align:
        align_statistics(found.model, source_images)
    adapters = measuring.make(found.model, options_of(values), source_images, guard=values.guard)
    whole = Measured([], [], dict(adapters.not_applicable))
    for setting in values.settings:
        for batch_size in values.batch_sizes:
            begin = time.perf_counter()
            where = {"classifier": kind, "setting": setting, "batch_size": batch_size}
            part = _setting(adapters, found, met, where, long_tables, seed=seed)
            whole.table.extend(part.table)
            whole.seconds.extend(part.seconds)
            failed = part.not_applicable.items()
            whole.not_applicable.update({f"{name}, {setting}, batches of {batch_size}": why for name, why in failed})
            say("", f"{kind}, {setting}, batches of {batch_size}: {time.perf_counter() - begin:.0f} s")
            say(*show(part.table, part.seconds))
    for name, reason in whole.not_applicable.items():
        say(f"{name}: not applicable: {reason}")
    return whole


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
) -> Measured:
    """All streams of one setting."""
    table: Rows = []
    clusters = where["classifier"] == "clusters"
    failed: dict[str, str] = {}
    seconds: dict[tuple[str, bool], list[float]] = {}
    for stream in shifts.streams(met, where["setting"], batch_size=where["batch_size"], seed=seed):
        answers, reasons = measuring.follow(adapters, met, stream, default_device())
        failed |= reasons
        table += [where | row for row in measuring.tabulate(answers, met, stream, clusters=clusters)]
        long_tables["stream"].add(where | row for row in measuring.curve(answers, met, stream, clusters=clusters))
        long_tables["predictions"].add(where | row for row in _predictions(answers, met, stream, found.names))
        for key, each in answers.items():
            seconds.setdefault(key, []).append(each.seconds / len(stream.shift))
    cost = [
        where | {"adapter": name, "guarded": int(guarded), "seconds_per_image": float(np.mean(each))}
        for (name, guarded), each in seconds.items()
    ]
    for long_table in long_tables.values():
        long_table.settle(failed)
    kept_table, kept_cost = ([row for row in rows if counts(row, failed)] for rows in (table, cost))
    return Measured(kept_table, kept_cost, failed)


def _predictions(
    answers: Mapping[tuple[str, bool], measuring.Answers],
    met: Sequence[shifts.Shift],
    stream: shifts.Stream,
    names: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """A row for each adapter and image without a label."""
    for (name, guarded), found in answers.items():
        for place, (index, image) in enumerate(zip(stream.shift.tolist(), stream.image.tolist(), strict=True)):
            shift = met[index]
            if shift.labels[image] < 0:
                row = {"shift": shift.title, "path": shift.paths[image], "adapter": name, "guarded": int(guarded)}
                answer = {"prediction": names[found.classes[place]], "confidence": float(found.confidence[place])}
                yield row | answer


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
    at_start = first | dict(zip(("shift", "severity"), shifts.CLEAN, strict=True)) | {"adapter": "source"}
    clean_errors = [row["error"] for row in measured if at_start.items() <= row.items()]
    shifted = [row for row in measured if (row["shift"], row["severity"]) != shifts.CLEAN]
    settings = {
        key: mean_errors(row for row in shifted if _key(row) == key) for key in dict.fromkeys(map(_key, shifted))
    }
    prefix = "guarded "
    guarded_means = {
        key: {name.removeprefix(prefix): value for name, value in means.items() if name.startswith(prefix)}
        for key, means in settings.items()
    }
    first_means = settings.get(_key(first), {})
    metrics |= first | {"clean": clean_errors[0] if clean_errors else None}
    metrics["errors"] = {name: value for name, value in first_means.items() if not name.startswith(prefix)}
    metrics["guarded"] = guarded_means.get(_key(first), {})
    metrics["settings"] = settings
    if guarded := [row for row in measured if row["guarded"]]:
        losses = [value - settings[key]["source"] for key, means in guarded_means.items() for value in means.values()]
        judged = [row for row in guarded if "guard_right" in row]
        images = sum(row["images"] for row in judged)
        metrics["guard"] = {
            "worst": max(row["minus_source"] for row in guarded),
            "worst_setting": max(losses) if settings else None,
            "right": sum(row["guard_right"] * row["images"] for row in judged) / images if images else None,
        }
    return metrics


def _key(row: Mapping[str, Any]) -> str:
    """Classifier, setting and batch size in one word; MLflow allows no commas in the name of a metric."""
    return f"{row['classifier']}/{row['setting']}/{row['batch_size']}"


def mean_errors(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean error of each adapter over rows that have one; with a guard, as `guarded NAME`."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(f"{'guarded ' if row['guarded'] else ''}{row['adapter']}", []).append(row["error"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def show(table: Rows, seconds: Rows) -> list[str]:
    """A line for each adapter: mean error over the shifts without and with a guard, worst shift, milliseconds."""
    means = mean_errors(row for row in table if "error" in row and (row["shift"], row["severity"]) != shifts.CLEAN)
    cost = {(row["adapter"], row["guarded"]): row["seconds_per_image"] * 1000 for row in seconds}
    lines = [f"{'adapter':14}{'error':>8}{'guarded':>9}{'- source':>10}{'worst':>8}{'ms':>8}"]
    for name in dict.fromkeys(row["adapter"] for row in table):
        own = [row["minus_source"] for row in table if row["adapter"] == name and not row["guarded"] and "error" in row]
        worst = f"{max(own):+.3f}" if own else ""
        both = [means.get(name), means.get(f"guarded {name}")]
        ahead = f"{means[name] - means['source']:+.3f}" if name in means else ""
        cells = [f"{value:.4f}" if value is not None else "" for value in both]
        lines.append(f"{name:14}{cells[0]:>8}{cells[1]:>9}{ahead:>10}{worst:>8}{cost.get((name, 0), np.nan):8.2f}")
    return lines


if __name__ == "__main__":
    main()
