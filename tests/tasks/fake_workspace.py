"""A small workspace with the files of every stage, made without running any of them."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from deepclust.adaptation import measuring, shifts
from deepclust.models import encoder as encoders
from tasks.adapt import __main__ as adapt
from tasks.shared.outputs import layout, stage
from tests.paths import ROOT as REPOSITORY

BASELINES = ("pixels", "random")
SHIFTS = (shifts.CLEAN, ("gaussian_noise", 5), ("fog", 5), ("contrast", 5), ("sketch", 0))


def build(
    root: Path,
    names: Sequence[str] = ("pixels", "random", "swav"),
    *,
    labelled: bool = True,
    channels: int = 1,
    size: int = 12,
    classes: int = 3,
    k: int = 3,
    count: int = 60,
    seed: int = 0,
    classifiers: Sequence[str] = ("linear",),
    adapters: Sequence[str] = ("source", "bn", "tent", "tsd"),
    settings: Sequence[str] = ("reset", "continual"),
    batch_size: int = 8,
    met: Sequence[tuple[str, int]] = SHIFTS,
) -> None:
    """Write params.yaml, artifacts/, metrics/ and plots/ into `root`, the current folder.

    Args:
        root: The folder.
        names: The encoders.
        labelled: Whether the images, training and test, have labels.
        channels: Of an image.
        size: Pixels of a side.
        classes: How many, where there are labels.
        k: Number of clusters.
        count: Images of each split, and of a shift.
        seed: Of everything.
        classifiers: That met shifted images, with `adapters` in `settings`.
        adapters: Their names.
        settings: See deepclust/adaptation/shifts.py.
        batch_size: Images of a batch.
        met: Name and severity of each shift.
    """
    random = np.random.default_rng(seed)
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    values["encoders"] = {name: name for name in names}
    values["report"]["map_images"] = 40
    values["adapt"] |= {"classifiers": list(classifiers), "adapters": list(adapters), "settings": list(settings)}
    values["adapt"]["batch_sizes"] = [batch_size]
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    class_names = [f"class {index}" for index in range(classes)] if labelled else []
    labels = {split: random.integers(0, classes, count) if labelled else np.full(count, -1) for split in layout.SPLITS}
    _prepare(random, class_names, labels, size, channels)
    for name in names:
        _encoder(random, name, size, channels, labels, class_names, k)
        streams = [shifts.Shift(*shift, np.empty((count, 0)), labels["test"], _paths(count)) for shift in met]
        _adapt(random, name, values["adapt"], streams, class_names, k)


_empty_store: list[Path] = []  # made once a session, because that takes seconds


def store(folders: pytest.TempPathFactory, root: Path) -> str:
    """Put an empty MLflow store into `root` and return its address."""
    from mlflow import MlflowClient

    if not _empty_store:
        path = folders.mktemp("store") / "mlflow.db"
        MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
        _empty_store.append(path)
    shutil.copyfile(_empty_store[0], root / "mlflow.db")
    return f"sqlite:///{root / 'mlflow.db'}"


def write(path: Path, value: Any) -> None:
    """Write JSON, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _prepare(
    random: np.random.Generator, classes: list[str], labels: dict[str, np.ndarray], size: int, channels: int
) -> None:
    for split, known in labels.items():
        layout.split(split).mkdir(parents=True)
        shape = (len(known), size, size, channels)
        images = (random.integers(0, 120, shape) + 40 * np.maximum(known, 0)[:, None, None, None]).astype(np.uint8)
        np.save(layout.split(split) / "images.npy", images)
        np.save(layout.split(split) / "labels.npy", known.astype(np.int64))
        with (layout.split(split) / "items.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "path", "label"])
            writer.writerows((index, f"{split}/{index:06d}", "") for index in range(len(known)))
    np.save(layout.split("train") / "heldout.npy", np.arange(6 if classes else 0))
    mean, std = [0.4] * channels, [0.2] * channels
    shape = {"image_size": size, "channels": channels, "resize": "crop"}
    write(layout.STATISTICS, {**shape, "mean": mean, "std": std})
    counts = {split: {"images": len(known), "labelled": int((known >= 0).sum())} for split, known in labels.items()}
    skipped = [{"path": "a<b>&.jpg", "reason": "truncated"}]
    write(
        layout.META,
        {"source": "folder", "classes": classes, **shape, **counts, "skipped": skipped, "warnings": []}
        | {"content_hash": "data-1"},
    )


def _encoder(
    random: np.random.Generator,
    name: str,
    size: int,
    channels: int,
    labels: dict[str, np.ndarray],
    classes: list[str],
    k: int,
) -> None:
    for folder in ("pretrain", "embed", "cluster", "linear", "adapt"):
        layout.out(folder, name).mkdir(parents=True)
    torch.manual_seed(len(name))
    backbone = "pixels" if name == "pixels" else "small"
    model = encoders.Encoder(
        backbone=backbone, image_size=size, channels=channels, mean=[0.4] * channels, std=[0.2] * channels
    ).eval()
    encoders.save(model, layout.out("pretrain", name), method=name, seed=0)
    trained = name not in BASELINES
    write(layout.metrics("pretrain", name), {"method": name} | ({"steps": 90, "final_loss": 2.5} if trained else {}))
    rows = [(step, step // 30, 5 / (1 + step / 20), 0.4 * (1 - step / 90)) for step in range(0, 90, 10) if trained]
    table(layout.curve("pretrain", name), ["step", "epoch", "loss", "rate"], rows)
    logged = [(*row, 2 - row[2] / 5) for row in rows]
    table(layout.out("pretrain", name) / "history.csv", ["step", "epoch", "loss", "rate", "feature_std"], logged)
    for split, known in labels.items():
        points = random.normal(size=(len(known), model.feature_dim)).astype(np.float32)
        points[:, :3] += 4 * np.eye(3, dtype=np.float32)[np.maximum(known, 0) % 3]
        np.save(layout.embeddings(name, split), points)
    score = 0.6 + 0.1 * random.random() + 0.1 * trained
    write(layout.metrics("embed", name), {"dim": model.feature_dim, "rankme": 20 + 10 * score})
    _cluster(random, name, model.feature_dim, labels, bool(classes), k, score)
    _linear(random, name, model.feature_dim, classes, score)


def _cluster(
    random: np.random.Generator, name: str, dim: int, labels: dict[str, np.ndarray], known: bool, k: int, score: float
) -> None:
    folder = layout.out("cluster", name)
    np.save(folder / "centroids.npy", random.normal(size=(k, dim)).astype(np.float32))
    write(folder / "cluster.json", {"k": k, "normalise": True})
    rows = [
        (split, index, f"{split}/{index:06d}", int(random.integers(k)), 0.5)
        for split, values in labels.items()
        for index in range(len(values))
    ]
    table(folder / "assignments.csv", ["split", "index", "path", "cluster", "distance"], rows)
    Image.new("RGB", (300, 40 * k), (250, 250, 250)).save(folder / "gallery.png")
    values: dict[str, Any] = {
        "silhouette": {"mean": 0.2, "std": 0.01},
        "inertia": {"mean": 99.0, "std": 1.0},
        "sizes": [1] * k,
    }
    if known:
        values |= {metric: {"mean": score - 0.1, "std": 0.012} for metric in ("acc", "nmi", "ari")}
    write(layout.metrics("cluster", name), {"k": k, **values, "other_k": {"20": values}})


def _linear(random: np.random.Generator, name: str, dim: int, classes: list[str], score: float) -> None:
    folder = layout.out("linear", name)
    write(
        folder / "classifier.json",
        {"classes": classes, "labelled": 60 if classes else 0, "reason": None if classes else "no labels"},
    )
    if not classes:
        write(layout.metrics("linear", name), {"labelled": 0, "reason": "no labelled training images"})
    else:
        weight = torch.from_numpy(random.normal(size=(len(classes), dim)).astype(np.float32))
        save_file({"weight": weight, "bias": torch.zeros(len(classes))}, folder / "classifier.safetensors")
        every = {"k20_t0.07": score, "k200_t0.07": score - 0.02, "k20_t0.1": score, "k200_t0.1": score - 0.02}
        write(
            layout.metrics("linear", name),
            {"labelled": 60, "knn": score, "linear": score + 0.02, "all": every, "weight_decay": 1e-4}
            | {"knn_heldout": score, "linear_heldout": score},
        )


def _adapt(
    random: np.random.Generator,
    name: str,
    values: dict[str, Any],
    met: Sequence[shifts.Shift],
    classes: list[str],
    k: int,
) -> None:
    """What the stage writes of answers that are made up; `bn` and `tent` do not apply to `pixels`."""
    tables: dict[str, list[dict[str, Any]]] = {"table": [], "stream": [], "predictions": [], "seconds": []}
    missing = [adapter for adapter in values["adapters"] if name == "pixels" and adapter in ("bn", "tent")]
    reasons = dict.fromkeys(missing, "no batch normalisation")
    for kind in values["classifiers"]:
        if kind != "clusters" and not classes:
            reasons[kind] = "no labelled training images, so there is no classifier"
            continue
        clusters = kind == "clusters"
        for setting in values["settings"]:
            where = {"classifier": kind, "setting": setting, "batch_size": values["batch_sizes"][0]}
            for stream in shifts.streams(met, setting, batch_size=where["batch_size"], seed=0):
                kept = [adapter for adapter in values["adapters"] if adapter not in missing]
                answers = _answers(random, kept, met, stream, k if clusters else len(classes))
                made = {
                    "table": measuring.tabulate(answers, met, stream, clusters=clusters),
                    "stream": measuring.curve(answers, met, stream, clusters=clusters),
                    "predictions": adapt._predictions(answers, met, stream, classes or [str(i) for i in range(k)]),
                }
                for part, rows in made.items():
                    tables[part] += [where | row for row in rows]
            tables["seconds"] += [
                where | {"adapter": adapter, "guarded": int(guarded), "seconds_per_image": 0.0004 * (2 + index)}
                for index, (adapter, guarded) in enumerate(answers)
            ]
    columns = {"table": measuring.COLUMNS, "stream": measuring.CURVE}
    columns |= {"predictions": adapt.PREDICTIONS, "seconds": adapt.SECONDS}
    for part, rows in tables.items():
        stage.write_text(layout.out("adapt", name) / f"{part}.csv", stage.table(rows, columns[part]))
    stage.write_text(layout.curve("adapt", name), stage.table(tables["table"], measuring.COLUMNS))
    none_applies = reasons.keys() >= set(values["classifiers"])
    write(layout.metrics("adapt", name), adapt.summary(tables["table"], reasons, met[0], none_applies=none_applies))


def _answers(
    random: np.random.Generator,
    adapters: Sequence[str],
    met: Sequence[shifts.Shift],
    stream: shifts.Stream,
    classes: int,
) -> dict[tuple[str, bool], measuring.Answers]:
    """Right on some share of the images, another for each adapter and shift."""
    count = len(stream.shift)
    truth = np.array([met[shift].labels[image] for shift, image in zip(stream.shift, stream.image, strict=True)])
    truth = np.maximum(truth, 0)
    found = {}
    hard = np.array([len(shift.name) % 7 / 10 for shift in met])[stream.shift]
    for index, adapter in enumerate(adapters):
        for guarded in (False, True)[: 1 + (adapter not in measuring.UNGUARDED)]:
            answers = measuring.Answers.of(count)
            chance = 0.9 - hard * random.uniform(0.4, 1.4, len(met))[stream.shift]
            answers.classes[:] = np.where(random.random(count) < chance, truth, random.integers(0, classes, count))
            answers.confidence[:] = 0.5 + 0.4 * random.random(count)
            answers.entropy[:] = 1 - answers.confidence
            answers.own[:] = answers.classes if not guarded else found[adapter, False].classes
            answers.given[:] = index % 3 if guarded else 0
            found[adapter, guarded] = answers
    return found


def _paths(count: int) -> list[str]:
    return [f"test/{index:06d}" for index in range(count)]


def table(path: Path, header: list[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write CSV, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
