"""Curves of healthy runs and of collapses, as docs/methods/*.png, and what the watchdog says of each.

    python benchmarks/curves.py            # all methods
    python benchmarks/curves.py simsiam

Takes the prepared images (`python -m tasks.prepare`) and the sections of params.yaml, cut to `--images` and `--epochs`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from deepclust import seeding
from deepclust.evaluation import watchdog
from deepclust.methods import method_class, simsiam
from deepclust.methods.parts.options import TrainedConfig
from deepclust.models import encoder
from deepclust.models.devices import default_device
from deepclust.training import loop
from tasks.pretrain import history
from tasks.shared.operations import params
from tasks.shared.outputs import environment, prepared

HEALTHY = "as in params.yaml"
STOP_GRADIENT = "without stop-gradient"
# What breaks each method: edits of its section.
BROKEN: dict[str, dict[str, dict[str, Any]]] = {
    "swav": {"rate × 100": {"optimiser.rate": 100.0}, "ε 0.001": {"epsilon": 0.001}, "ε 1": {"epsilon": 1.0}},
    "deepcluster_v2": {"rate × 100": {"optimiser.rate": 100.0}},
    "moco": {"rate × 100": {"optimiser.rate": 100.0}},
    "pcl": {"rate × 100": {"optimiser.rate": 100.0}},
    "simsiam": {"rate × 100": {"optimiser.rate": 100.0}, STOP_GRADIENT: {}},
}
SHOWN = {
    "loss": "loss",
    "embedding_spread": "spread of the embeddings (1 healthy, 0 collapsed)",
    "prototypes_used": "share of prototypes in use",
    "gradient_norm": "norm of the gradient",
}
SMOOTH = 5  # steps that a point averages


def section(
    raw: dict[str, Any], method: str, edits: dict[str, Any], epochs: int
) -> tuple[TrainedConfig, params.Params]:
    """The method's section with edits; a number below `optimiser.rate` multiplies the rate."""
    raw = copy.deepcopy(raw)
    own = raw["pretrain"][method]
    own["epochs"] = epochs
    for name, value in edits.items():
        if name == "optimiser.rate":
            optimiser = own.setdefault("optimiser", {})
            optimiser["rate"] = value * optimiser.get("rate", raw["pretrain"]["shared"]["optimiser"]["rate"])
        else:
            own[name] = value
    values = params.parse(raw)
    found = values.options(method)
    assert isinstance(found, TrainedConfig)
    return found, values


@contextmanager
def no_stop_gradient(really: bool) -> Iterator[None]:
    """SimSiam's loss with the gradient through both sides."""

    def loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
        cosine = torch.nn.functional.cosine_similarity
        return -(cosine(p1, z2).mean() + cosine(p2, z1).mean()) / 2

    with mock.patch.object(simsiam, "symmetric_loss", loss if really else simsiam.symmetric_loss):
        yield


def run(name: str, chosen: TrainedConfig, values: params.Params, count: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Train; the rows of the history, and the watchdog's words."""
    statistics = prepared.statistics(name)
    images = prepared.images("train", name)[:count]
    device = default_device()
    with seeding.seeded(values.seed, "weights"):
        trained = encoder.Encoder(
            backbone=values.pretrain.shared.backbone,
            stem=values.pretrain.shared.stem,
            image_size=statistics["image_size"],
            channels=statistics["channels"],
            mean=statistics["mean"],
            std=statistics["std"],
        )
    config = chosen.sized(images=len(images), image_size=statistics["image_size"])
    with seeding.seeded(values.seed, "heads"):
        method = method_class(name)(trained.backbone, trained.feature_dim, config).to(device)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained.to(device)

    def normalise(crops: Tensor) -> Tensor:
        return (crops - trained.mean) / trained.std

    dog = watchdog.Watchdog(method, images, normalise=normalise, device=device, seed=values.seed)
    rows: list[dict[str, Any]] = []
    words: list[str] = []

    def on_step(done: loop.Step) -> None:
        rows.append(history.as_row(done))
        dog.step(done)

    def on_epoch(done: loop.Epoch) -> None:
        report = dog.epoch(done)
        words.extend(f"epoch {done.epoch + 1}: {alarm.message}" for alarm in report.alarms)
        print("   ", {name: float(f"{value:.3g}") for name, value in report.indicators.items()}, flush=True)

    how = {"seed": values.seed, "precision": values.pretrain.shared.precision}
    try:
        loop.train(method, images, **how, normalise=normalise, device=device, on_step=on_step, on_epoch=on_epoch)
    except loop.TrainingError as error:
        words.append(str(error))
    return rows, words


def draw(method: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """One panel for each number that the method logs."""
    names = [name for name in SHOWN if any(name in row for rows in runs.values() for row in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for label, rows in runs.items():
            values = [row[name] for row in rows]
            points = [
                sum(values[at : at + SMOOTH]) / len(values[at : at + SMOOTH]) for at in range(0, len(values), SMOOTH)
            ]
            axis.plot(range(0, len(values), SMOOTH), points, label=label, linewidth=2 if label == HEALTHY else 1.2)
        axis.set_title(SHOWN[name], fontsize=9)
        axis.set_xlabel("update", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[-1].set_yscale("log")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(f"docs/methods/{method}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Train, draw and print."""
    parser = argparse.ArgumentParser(prog="python benchmarks/curves.py", description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=list(BROKEN), help=", ".join(BROKEN))
    parser.add_argument("--images", type=int, default=15_000)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    environment.limit_threads()
    raw = params.read()
    for method in arguments.methods:
        runs = {}
        for label, edits in {HEALTHY: {}, **BROKEN[method]}.items():
            print(f"{method}, {label}", flush=True)
            with no_stop_gradient(label == STOP_GRADIENT):
                runs[label], words = run(method, *section(raw, method, edits, arguments.epochs), arguments.images)
            print("\n".join(f"    {word}" for word in words) or "    no alarm", flush=True)
        draw(method, runs)


if __name__ == "__main__":
    main()
