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

SHIFTS = (shifts.CLEAN, ("gaussian_noise", 5), ("fog", 5), ("contrast", 5), ("sketch", 0))
SIZE, CLASSES, COUNT, BATCH = 12, 3, 60, 8  # pixels of a side, classes, images of a split and of a shift, of a batch
ADAPTERS, SETTINGS = ("source", "bn", "tent", "tsd"), ("reset", "continual")
_empty_store: list[Path] = []  # made once a session, because that takes seconds


def build(
    root: Path,
    names: Sequence[str],
    *,
    labelled: bool = True,
    channels: int = 1,
    k: int = 3,
    classifiers: Sequence[str] = ("linear",),
    met: Sequence[tuple[str, int]] = SHIFTS,
) -> None:
    """Write params.yaml, artifacts/, metrics/ and plots/ into `root`, the current folder.

    Args:
        root: The folder.
        names: The encoders.
        labelled: Whether the images, training and test, have labels.
        channels: Of an image.
        k: Number of clusters.
        classifiers: That met shifted images.
        met: Name and severity of each shift.
    """
    random = np.random.default_rng(0)
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    values["encoders"] = {name: name for name in names}
    values["report"]["map_images"] = 40
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    classes = [f"class {index}" for index in range(CLASSES)] if labelled else []
    labels = {split: random.integers(0, CLASSES, COUNT) if labelled else np.full(COUNT, -1) for split in layout.SPLITS}
    _prepare(random, classes, labels, channels)
    paths = [f"test/{index:06d}" for index in range(COUNT)]
    for name in names:
        _encoder(random, name, channels, labels, classes, k)
        streams = [shifts.Shift(*shift, np.empty((COUNT, 0)), labels["test"], paths) for shift in met]
        _adapt(random, name, classifiers, streams, classes, k)


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
    stage.write_text(path, json.dumps(value, indent=2) + "\n")


def table(path: Path, header: list[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write CSV, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _prepare(random: np.random.Generator, classes: list[str], labels: dict[str, np.ndarray], channels: int) -> None:
    for split, known in labels.items():
        layout.split(split).mkdir(parents=True)
        noise = random.integers(0, 120, (COUNT, SIZE, SIZE, channels))
        images = (noise + 40 * np.maximum(known, 0)[:, None, None, None]).astype(np.uint8)
        np.save(layout.split(split) / "images.npy", images)
        np.save(layout.split(split) / "labels.npy", known.astype(np.int64))
    shape = {"image_size": SIZE, "channels": channels, "resize": "crop"}
    write(layout.STATISTICS, {**shape, "mean": [0.4] * channels, "std": [0.2] * channels})
    counts = {split: {"images": COUNT, "labelled": int((known >= 0).sum())} for split, known in labels.items()}
    skipped = [{"path": "a<b>&.jpg", "reason": "truncated"}]
    meta = {"source": "folder", "classes": classes, **shape, **counts, "skipped": skipped, "warnings": []}
    write(layout.META, meta | {"content_hash": "data-1"})


def _encoder(
    random: np.random.Generator, name: str, channels: int, labels: dict[str, np.ndarray], classes: list[str], k: int
) -> None:
    for each in ("pretrain", "embed", "cluster", "linear", "adapt"):
        layout.out(each, name).mkdir(parents=True)
    torch.manual_seed(len(name))
    statistics = {"mean": [0.4] * channels, "std": [0.2] * channels}
    backbone = "pixels" if name == "pixels" else "small"
    model = encoders.Encoder(backbone=backbone, image_size=SIZE, channels=channels, **statistics).eval()
    encoders.save(model, layout.out("pretrain", name), method=name, seed=0)
    trained = name not in ("pixels", "random")
    write(layout.metrics("pretrain", name), {"method": name})
    logged = [(step, step // 30, 5 / (1 + step / 20), 2 - 1 / (1 + step / 20)) for step in range(0, 90, 10) if trained]
    table(layout.out("pretrain", name) / "history.csv", ["step", "epoch", "loss", "feature_std"], logged)
    table(layout.curve("pretrain", name), ["step", "epoch", "loss"], [row[:3] for row in logged])
    for split, known in labels.items():
        points = random.normal(size=(COUNT, model.feature_dim)).astype(np.float32)
        points[:, :3] += 4 * np.eye(3, dtype=np.float32)[np.maximum(known, 0) % 3]
        np.save(layout.embeddings(name, split), points)
    score = 0.6 + 0.1 * random.random() + 0.1 * trained
    write(layout.metrics("embed", name), {"dim": model.feature_dim, "rankme": 20 + 10 * score})
    folder = layout.out("cluster", name)
    np.save(folder / "centroids.npy", random.normal(size=(k, model.feature_dim)).astype(np.float32))
    write(folder / "cluster.json", {"k": k, "normalise": True})
    rows = [
        (split, index, f"{split}/{index:06d}", random.integers(k), 0.5) for split in labels for index in range(COUNT)
    ]
    table(folder / "assignments.csv", ["split", "index", "path", "cluster", "distance"], rows)
    Image.new("RGB", (300, 40 * k), (250, 250, 250)).save(folder / "gallery.png")
    scores: dict[str, Any] = {"silhouette": {"mean": 0.2, "std": 0.01}, "sizes": [1] * k}
    scores |= {metric: {"mean": score - 0.1, "std": 0.012} for metric in ("acc", "nmi", "ari") if classes}
    write(layout.metrics("cluster", name), {"k": k, **scores, "other_k": {"20": scores}})
    folder = layout.out("linear", name)
    write(folder / "classifier.json", {"classes": classes})
    write(layout.metrics("linear", name), {"labelled": 0, "reason": "no labelled training images"})
    if classes:
        weight = torch.from_numpy(random.normal(size=(CLASSES, model.feature_dim)).astype(np.float32))
        save_file({"weight": weight, "bias": torch.zeros(CLASSES)}, folder / "classifier.safetensors")
        every = {"k20_t0.07": score, "k200_t0.07": score - 0.02, "k20_t0.1": score, "k200_t0.1": score - 0.02}
        found = {"knn": score, "linear": score + 0.02, "all": every, "knn_heldout": score}
        write(layout.metrics("linear", name), {"labelled": COUNT, **found})


def _adapt(
    random: np.random.Generator,
    name: str,
    classifiers: Sequence[str],
    met: Sequence[shifts.Shift],
    classes: list[str],
    k: int,
) -> None:
    """What the stage writes of answers that are made up; `bn` and `tent` do not apply to `pixels`."""
    columns = {"table": measuring.COLUMNS, "stream": measuring.CURVE}
    columns |= {"predictions": adapt.PREDICTIONS, "seconds": adapt.SECONDS}
    tables: dict[str, list[dict[str, Any]]] = {part: [] for part in columns}
    missing = ("bn", "tent") if name == "pixels" else ()
    reasons = dict.fromkeys(missing, "no batch normalisation")
    kept = [adapter for adapter in ADAPTERS if adapter not in missing]
    for kind in classifiers:
        clusters = kind == "clusters"
        if not clusters and not classes:
            reasons[kind] = "no labelled training images, so there is no classifier"
            continue
        names = [str(number) for number in range(k)] if clusters else classes
        for setting in SETTINGS:
            where = {"classifier": kind, "setting": setting, "batch_size": BATCH}
            for stream in shifts.streams(met, setting, batch_size=BATCH, seed=0):
                answers = _answers(random, kept, met, stream, len(names))
                made = {
                    "table": measuring.tabulate(answers, met, stream, clusters=clusters),
                    "stream": measuring.curve(answers, met, stream, clusters=clusters),
                    "predictions": adapt._predictions(answers, met, stream, names),
                }
                for part, rows in made.items():
                    tables[part] += [where | row for row in rows]
            tables["seconds"] += [
                where | {"adapter": adapter, "guarded": int(guarded), "seconds_per_image": 0.0004 * (2 + index)}
                for index, (adapter, guarded) in enumerate(answers)
            ]
    for part, rows in tables.items():
        stage.write_text(layout.out("adapt", name) / f"{part}.csv", stage.table(rows, columns[part]))
    stage.write_text(layout.curve("adapt", name), stage.table(tables["table"], measuring.COLUMNS))
    none_applies = reasons.keys() >= set(classifiers)
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
    hard = np.array([len(shift.name) % 7 / 10 for shift in met])[stream.shift]
    found: dict[tuple[str, bool], measuring.Answers] = {}
    for index, adapter in enumerate(adapters):
        for guarded in (False, True)[: 1 + (adapter not in measuring.UNGUARDED)]:
            answers = measuring.Answers.of(count)
            right = random.random(count) < 0.9 - hard * random.uniform(0.4, 1.4, len(met))[stream.shift]
            answers.classes[:] = np.where(right, np.maximum(truth, 0), random.integers(0, classes, count))
            answers.confidence[:] = 0.5 + 0.4 * random.random(count)
            answers.entropy[:] = 1 - answers.confidence
            answers.own[:] = found[adapter, False].classes if guarded else answers.classes
            answers.given[:] = index % 3 if guarded else 0
            found[adapter, guarded] = answers
    return found
