"""The stage `adapt` over several trained workspaces, and so training seeds: mean ± std, and what the guard saves.

    python benchmarks/adaptation.py
    python benchmarks/adaptation.py --workspaces seeds/seed0 seeds/seed1 --override adapt.batch_sizes=[1,16,128]
    python benchmarks/adaptation.py --heldout --override adapt.tsd.rate=1e-5

A workspace is a folder in which the stages up to `linear` have run (`benchmarks/seeds.py --keep` makes some); the
parameters are this repository's, with each workspace's seed. Options are to be chosen with `--heldout` alone: it takes
the held-out training images in place of the test images, and a linear classifier that never saw them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deepclust.adaptation import measuring, shifts
from deepclust.evaluation import probing
from tasks.adapt import __main__ as adapt
from tasks.adapt import budget, classifiers
from tasks.shared.operations import params
from tasks.shared.operations.params import overrides, schema
from tasks.shared.outputs import environment, layout, prepared

ROOT = Path(__file__).resolve().parents[1]
Rows = list[dict[str, Any]]
KEY = ("classifier", "setting", "batch_size")


def measure(root: Path, encoder: str, values: schema.Params, *, heldout: bool) -> Rows:
    """The stage's table in a workspace."""
    os.chdir(root)
    rows: Rows = []
    with tempfile.TemporaryDirectory() as work:
        count = values.adapt.images if values.adapt.images != "auto" else budget.SIZES[0]
        met = list((_heldout if heldout else adapt.collect)(values, encoder, count, Path(work)))
        source_images = list(adapt.source_batches(values.seed, encoder))
        long_tables = {
            name: adapt.LongTable(Path(work) / f"{name}.csv", columns)
            for name, columns in (("stream", measuring.CURVE), ("predictions", adapt.PREDICTIONS))
        }
        for kind in values.adapt.classifiers:
            found = classifiers.build(kind, encoder, values, source_images)
            if found.model is None:
                print(f"{root}: {kind}: {found.reason}", file=sys.stderr)
                continue
            if heldout:
                found.model.head.load_state_dict(_refitted(encoder, values).state_dict())
            rows += adapt.run(found, kind, met, source_images, values.adapt, long_tables, seed=values.seed).table
    return rows


def _heldout(values: schema.Params, encoder: str, count: int, work: Path) -> Iterable[shifts.Shift]:
    """As `adapt.collect`, of the held-out training images and without domains."""
    rows = prepared.heldout()
    rows = rows[shifts.choose(prepared.labels("train")[rows], count=count, seed=values.seed)]
    images, labels = prepared.images("train", encoder)[rows], prepared.labels("train")[rows]
    clean = shifts.Shift(*shifts.CLEAN, images, labels, [str(row) for row in rows])
    yield clean
    for name in values.adapt.corruptions:
        for severity in values.adapt.severities:
            yield shifts.corrupted(clean, name, severity, seed=values.seed, file=work / f"{name}-{severity}.npy")


def _refitted(encoder: str, values: schema.Params) -> nn.Linear:
    """The linear classifier without the held-out images, at the first weight decay."""
    labels = prepared.labels("train")
    rows = np.setdiff1d(np.flatnonzero(labels >= 0), prepared.heldout())
    features = torch.from_numpy(np.load(layout.embeddings(encoder, "train"), allow_pickle=False)[rows])
    fitted = probing.fit_linear(
        features,
        torch.from_numpy(labels[rows]),
        classes=len(prepared.meta()["classes"]),
        weight_decays=values.linear.weight_decays[:1],
        iterations=values.linear.iterations,
    )[0]
    head = nn.Linear(features.shape[1], len(fitted.weight))
    head.load_state_dict({"weight": fitted.weight, "bias": fitted.bias})
    return head


def report(tables: list[Rows]) -> str:
    """Markdown: for each setting, one line an adapter, mean ± std over the workspaces."""
    lines: list[str] = []
    settings = dict.fromkeys(tuple(row[key] for key in KEY) for row in tables[0])
    for setting in settings:
        own = [[row for row in table if tuple(row[key] for key in KEY) == setting] for table in tables]
        means = [adapt.mean_errors(rows) for rows in own]
        lines += [f"\n{setting[0]}, {setting[1]}, batches of {setting[2]}: mean over the shifts", ""]
        lines += ["| adapter | error | - source | guarded | - source | worst shift | worst shift, guarded |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name in dict.fromkeys(row["adapter"] for row in own[0]):
            cells = [_cell([mean.get(name) for mean in means]), _cell(_less(means, name))]
            cells += [_cell([mean.get(f"guarded {name}") for mean in means]), _cell(_less(means, f"guarded {name}"))]
            cells += [_worst(own, name, 0), _worst(own, name, 1)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    guarded = [row for table in tables for row in table if row["guarded"] and "guard_right" in row]
    if guarded:
        images = sum(row["images"] for row in guarded)
        right = sum(row["guard_right"] * row["images"] for row in guarded) / images
        lines += [
            f"\nThe guard's answer was no worse than the adapter's and the source's on {right:.1%} of the images."
        ]
    return "\n".join(lines)


def _less(means: list[dict[str, float]], name: str) -> list[float | None]:
    return [mean[name] - mean["source"] if name in mean else None for mean in means]


def _worst(tables: Iterable[Rows], name: str, guarded: int) -> str:
    """The largest loss against the source model on a shift, `clean` included, in any workspace."""
    found = [
        (row["minus_source"], f"{row['shift']} {row['severity'] or ''}".strip())
        for rows in tables
        for row in rows
        if (row["adapter"], row["guarded"]) == (name, guarded) and "minus_source" in row
    ]
    return f"{max(found)[0]:+.3f} ({max(found)[1]})" if found else ""


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "n/a"
    mean = f"{statistics.mean(known):.3f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.3f}"


def values_of(root: Path, edits: list[str]) -> schema.Params:
    """This repository's parameters with the edits, and the seed of a workspace."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / layout.PARAMS
        file.write_text((ROOT / layout.PARAMS).read_text(encoding="utf-8"), encoding="utf-8")
        seed: Mapping[str, Any] = params.read(root / layout.PARAMS)
        overrides.apply([f"adapt.domains={ROOT / 'domains'}", f"seed={seed['seed']}", *edits], file)
        return params.load(file)


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(prog="python benchmarks/adaptation.py", description=__doc__.splitlines()[0])
    parser.add_argument("--workspaces", type=Path, nargs="+", default=[ROOT])
    parser.add_argument("--encoder", default="swav")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="edits of params.yaml")
    parser.add_argument("--heldout", action="store_true", help="held-out training images in place of the test images")
    arguments = parser.parse_args()
    environment.prepare()
    environment.limit_threads()
    started = time.perf_counter()
    tables = []
    for root in [path.resolve() for path in arguments.workspaces]:
        values = values_of(root, arguments.override)
        tables.append(measure(root, arguments.encoder, values, heldout=arguments.heldout))
    print(report(tables))
    print(f"\n{len(tables)} workspaces, {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
