"""Adapt: an encoder's linear classifier on corrupted test streams, every adapter beside the source model.

    python -m tasks.adapt ENCODER

A stream is the same seeded choice of labelled test images, in the same order, under one corruption of one severity; the
stream `clean` (severity 0) has none. Adapters start each stream afresh. Without labels there is nothing to measure: the
tables are then empty, and the metrics say why.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from deepclust import encoder as encoders
from deepclust import seeding
from deepclust.adaptation import ADAPTERS
from deepclust.adaptation.base import Adapter
from deepclust.adaptation.classifier import Classifier
from deepclust.corruptions import corrupt
from deepclust.devices import default_device
from deepclust.errors import AdaptationError, CheckpointError
from deepclust.views import to_float
from tasks import layout, prepared, sections, stage

COLUMNS = ["adapter", "corruption", "severity", "error"]
CLEAN = ("clean", 0)


@dataclass(frozen=True)
class Chosen:
    """The labelled test images of every stream.

    Attributes:
        images: (N, H, W, C) uint8, in the stream's order.
        labels: (N,) int64.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def choose(images: NDArray[np.uint8], labels: NDArray[np.int64], *, count: int, seed: int) -> Chosen:
    """At most `count` of the labelled images, a seeded choice in a seeded order."""
    labelled = np.flatnonzero(labels >= 0)
    order = torch.randperm(len(labelled), generator=seeding.generator("adapt", seed)).numpy()
    chosen = labelled[order[:count]]
    return Chosen(images[chosen], labels[chosen])


def cuts(count: int, batch_size: int) -> list[slice]:
    """Batches of a stream; a single image left over goes into the batch before it, where statistics can be taken."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and batch_size > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts, count][1:], strict=True)]


def batches(
    test: Chosen, corruption: str, severity: int, *, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) in [0, 1] and labels (B,) of one stream, on the CPU.

    All severities of a corruption share their random numbers, so that they differ in strength alone.
    """
    generator = seeding.generator("adapt", seed, corruption)
    for cut in cuts(len(test.labels), batch_size):
        images = to_float(torch.from_numpy(test.images[cut]))
        if (corruption, severity) != CLEAN:
            images = corrupt(images, corruption, severity, generator=generator)
        yield images, torch.from_numpy(test.labels[cut])


def make_adapters(model: Classifier, values: sections.Adapt) -> tuple[dict[str, Adapter], dict[str, str]]:
    """The adapters that apply to the model, and why the others do not. `source` is always there, to compare with."""
    adapters: dict[str, Adapter] = {}
    not_applicable: dict[str, str] = {}
    for name in dict.fromkeys(("source", *values.adapters)):
        options: dict[str, Any] = values.tsd.model_dump() if name == "tsd" else {}
        try:
            adapters[name] = ADAPTERS[name](model, **options)
        except AdaptationError as error:
            not_applicable[name] = str(error)
    return adapters, not_applicable


def measure(
    adapters: dict[str, Adapter], stream: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Error of each adapter, reset first, on one stream; and why an adapter could not go through with it."""
    wrong = dict.fromkeys(adapters, 0)
    failed: dict[str, str] = {}
    count = 0
    for adapter in adapters.values():
        adapter.reset()
    for images, labels in stream:
        images = images.to(device)
        count += len(labels)
        for name in [name for name in adapters if name not in failed]:
            try:
                predictions = adapters[name](images).argmax(dim=1).cpu()
            except AdaptationError as error:
                failed[name] = str(error)
            else:
                wrong[name] += int((predictions != labels).sum())
    return {name: wrong[name] / count for name in adapters if name not in failed}, failed


def load_head(folder: Path, feature_dim: int) -> nn.Linear | None:
    """The linear classifier of the stage `linear`, or None if that stage had no labels.

    Raises:
        CheckpointError: If it is missing, damaged, or was made for other features.
    """
    try:
        description = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "classifier.safetensors") if description["classes"] else None
        if weights is None:
            return None
        weight, bias = weights["weight"], weights["bias"]
    except FileNotFoundError as error:
        raise CheckpointError(f"expected a classifier in {folder}, found none; run its linear stage") from error
    except Exception as error:  # safetensors raises its own, undocumented types on damaged files
        raise CheckpointError(f"the classifier in {folder} is damaged ({error}); run its linear stage again") from error
    expected = (len(description["classes"]), feature_dim)
    if weight.shape != expected or bias.shape != expected[:1]:
        raise CheckpointError(
            f"expected a classifier {expected} (classes, features) in {folder}, got {tuple(weight.shape)} and bias "
            f"{tuple(bias.shape)}; run its embed and linear stages again"
        )
    head = nn.Linear(feature_dim, expected[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


def run(
    model: Classifier, test: Chosen, values: sections.Adapt, *, seed: int, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every adapter on every stream.

    Returns:
        One row a stream and adapter, and the metrics.
    """
    # Channels-last convolutions are up to three times as fast on a CPU.
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    adapters, not_applicable = make_adapters(model, values)
    for name, reason in not_applicable.items():
        print(f"{name}: not applicable: {reason}", flush=True)
    shifts = [(corruption, severity) for corruption in values.corruptions for severity in values.severities]
    rows: list[dict[str, Any]] = []
    for corruption, severity in [CLEAN, *shifts]:
        stream = batches(test, corruption, severity, batch_size=values.batch_size, seed=seed)
        errors, failed = measure(adapters, stream, device)
        for name, reason in failed.items():
            print(f"{name}: not applicable: {reason}", flush=True)
            del adapters[name]
        not_applicable |= failed
        rows += [
            {"adapter": name, "corruption": corruption, "severity": severity, "error": error}
            for name, error in errors.items()
        ]
        label = corruption if (corruption, severity) == CLEAN else f"{corruption} {severity}"
        print(f"{label}: error " + ", ".join(f"{name} {error:.4f}" for name, error in errors.items()), flush=True)
    rows = [row for row in rows if row["adapter"] in adapters]
    shifted = [row for row in rows if row["corruption"] != CLEAN[0]]
    metrics = {
        "clean": next(row["error"] for row in rows if row["adapter"] == "source"),
        "errors": {
            name: float(np.mean([row["error"] for row in shifted if row["adapter"] == name])) for name in adapters
        },
        "not_applicable": not_applicable,
        "images": len(test.labels),
    }
    return rows, metrics


def show(rows: list[dict[str, Any]]) -> str:
    """Mean error over severities, one line an adapter, one column a corruption."""
    corruptions = list(dict.fromkeys(row["corruption"] for row in rows))
    lines = [" ".join(["adapter".ljust(8), *(name.rjust(max(len(name), 6)) for name in corruptions)])]
    for adapter in dict.fromkeys(row["adapter"] for row in rows):
        cells = [adapter.ljust(8)]
        for name in corruptions:
            found = [row["error"] for row in rows if (row["adapter"], row["corruption"]) == (adapter, name)]
            cells.append(f"{np.mean(found):.4f}".rjust(max(len(name), 6)))
        lines.append(" ".join(cells))
    return "\n".join(lines)


def nothing_to_measure(head: nn.Linear | None, test: Chosen) -> str | None:
    """Why there are no errors to measure, if there are none."""
    if head is None:
        return "no labelled training images, so there is no classifier"
    if head.out_features < 2:
        return "a single class, which no classifier can get wrong"
    return None if len(test.labels) else "no labelled test images"


def main() -> None:
    """Measure the adapters of one encoder."""
    with stage.running("adapt") as here:
        assert here.encoder
        values = here.params.adapt
        rows: list[dict[str, Any]] = []
        encoder = encoders.load(layout.out("pretrain", here.encoder))
        head = load_head(layout.out("linear", here.encoder), encoder.feature_dim)
        test = choose(prepared.images("test"), prepared.labels("test"), count=values.images, seed=here.params.seed)
        reason = nothing_to_measure(head, test)
        if head is None or reason:
            print(f"{here.encoder}: nothing to measure: {reason}", flush=True)
            here.metrics({"labelled": 0, "reason": reason})
        else:
            if len(test.labels) < values.images:
                print(f"adapt.images {values.images}: there are {len(test.labels)} labelled test images, all are used")
            started = time.perf_counter()
            rows, metrics = run(Classifier(encoder, head), test, values, seed=here.params.seed, device=default_device())
            print(f"{show(rows)}\n{time.perf_counter() - started:.0f} s", flush=True)
            here.metrics(metrics)
        stage.write_text(here.folder / "errors.csv", stage.table(rows, COLUMNS))
        here.curve(rows, COLUMNS)


if __name__ == "__main__":
    main()
