"""A small workspace with what the stage `adapt` reads, made without running any stage: encoders `swav` and `pixels`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from deepclust import seeding
from deepclust.adaptation import Classifier
from deepclust.clustering import kmeans
from deepclust.models import encoder as encoders
from deepclust.models.features import to_float
from tasks.shared.operations.params import overrides
from tasks.shared.outputs import layout
from tests.paths import ROOT as REPOSITORY

SIZE, CLASSES, CLUSTERS = 12, ("a", "b", "c"), 4
COUNTS = {"train": 96, "test": 61}
STATISTICS = {"image_size": SIZE, "channels": 1, "mean": [0.4], "std": [0.3]}
BACKBONES = {"swav": "small", "pixels": "pixels"}
EDITS = ["adapt.corruptions=[gaussian_noise, contrast]", "adapt.severities=[5]", "adapt.batch_sizes=[16]"]


def images_and_labels(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey images whose class is which third is bright."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(CLASSES), count)
    images = random.integers(0, 120, (count, SIZE, SIZE, 1))
    images += 60 * (np.arange(SIZE) // 4 == labels[:, None])[:, None, :, None]
    return images.astype(np.uint8), labels


def encoder_of(backbone: str) -> encoders.Encoder:
    """An encoder whose BatchNorm has seen images, but darker ones: as after pretraining on augmented views."""
    with seeding.seeded("test"):
        encoder = encoders.Encoder(backbone=backbone, **STATISTICS)  # type: ignore[arg-type]
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        encoder(to_float(torch.from_numpy(images_and_labels(96, seed=0)[0])) * 0.6)
    return encoder.eval().requires_grad_(False)


def classifier_of(backbone: str) -> Classifier:
    """The encoder and a head fitted to its features of the training images, then disturbed so that it errs at times."""
    images, labels = images_and_labels(96, seed=0)
    encoder = encoder_of(backbone)
    features = encoder(to_float(torch.from_numpy(images)))
    centred = features - features.mean(0)
    targets = F.one_hot(torch.from_numpy(labels)).float() - 1 / len(CLASSES)
    ridge = centred.T @ centred + 5.0 * torch.eye(features.shape[1])
    weight = 4 * torch.linalg.solve(ridge, centred.T @ targets).T
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    head = nn.Linear(features.shape[1], len(CLASSES)).requires_grad_(False)
    head.weight.copy_(weight + 3 * weight.std() * noise)
    head.bias.copy_(-(head.weight @ features.mean(0)))
    return Classifier(encoder, head).eval()


def build(root: Path, *, edits: list[str] | None = None) -> None:
    """Write params.yaml and artifacts/ into `root`, the current folder."""
    shutil.copy(REPOSITORY / "params.yaml", root)
    overrides.apply([*EDITS, *(edits or [])], root / "params.yaml")
    (root / "domains").mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        images, labels = images_and_labels(COUNTS[split], seed)
        folder = layout.split(split)
        folder.mkdir(parents=True)
        layout.images(SIZE).mkdir(parents=True, exist_ok=True)
        np.save(images_file(split), images)
        np.save(folder / "labels.npy", labels)
        lines = "".join(f"{index},{split}/{index:03}.png,{label}\n" for index, label in enumerate(labels))
        (folder / "items.csv").write_text("index,path,label\n" + lines)
    for name in BACKBONES:
        file = layout.statistics(name)
        file.parent.mkdir(exist_ok=True)
        hashes = {split: hashlib.sha256(images_file(split).read_bytes()).hexdigest() for split in COUNTS}
        file.write_text(json.dumps(STATISTICS | {"resize": "crop", "held": SIZE, "images": hashes}))
    describe(CLASSES)
    for name, backbone in BACKBONES.items():
        model = classifier_of(backbone)
        for stage in ("pretrain", "linear", "cluster"):
            layout.out(stage, name).mkdir(parents=True)
        encoders.save(model.featurizer, layout.out("pretrain", name))
        folder = layout.out("linear", name)
        save_file(model.head.state_dict(), folder / "classifier.safetensors")
        (folder / "classifier.json").write_text(json.dumps({"classes": list(CLASSES), "labelled": 96, "reason": None}))
        cluster(name, normalise=True)


def images_file(split: str) -> Path:
    """Where the images of a split are."""
    return layout.images(SIZE) / f"{split}.npy"


def describe(classes: Sequence[str]) -> None:
    """Write meta.json."""
    meta: dict[str, Any] = {"source": "made", "classes": list(classes), "held": SIZE, "channels": 1}
    meta |= {split: {"images": count, "labelled": count} for split, count in COUNTS.items()}
    meta |= {"content_hash": "", "skipped": [], "ignored": 0, "left_out": []}
    layout.META.write_text(json.dumps(meta | {"warnings": []}))


def cluster(name: str, *, normalise: bool) -> None:
    """Write the stage `cluster`'s output."""
    images = to_float(torch.from_numpy(np.load(images_file("train"))))
    features = encoders.load(layout.out("pretrain", name))(images)
    points = F.normalize(features, dim=1) if normalise else features
    folder = layout.out("cluster", name)
    np.save(folder / "centroids.npy", kmeans.fit(points, CLUSTERS, seed=0, iterations=20).centroids.numpy())
    (folder / "cluster.json").write_text(json.dumps({"k": CLUSTERS, "normalise": normalise}))


def unlabel() -> None:
    """Take the labels and what was learnt from them."""
    for split in layout.SPLITS:
        np.save(layout.split(split) / "labels.npy", np.full(COUNTS[split], -1))
    describe([])
    for name in BACKBONES:
        (layout.out("linear", name) / "classifier.safetensors").unlink()
        (layout.out("linear", name) / "classifier.json").write_text(json.dumps({"classes": []}))
