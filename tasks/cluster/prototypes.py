"""The prototypes of SwAV and DeepCluster-v2 as clusters: each image belongs to the prototype of the highest score.

No k-means is fitted. New images are assigned by the projection head in eval mode and prototypes of unit length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust.config import Count
from deepclust.errors import CheckpointError
from deepclust.evaluation import metrics
from deepclust.methods.parts import heads
from deepclust.models import weights
from tasks.shared.outputs import layout, prepared, read

Assignments = dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]]
"""For each head, the strongest prototype of each image and its score."""
COLUMNS = ["split", "index", "path", "head", "prototype", "score"]
_ROWS = 8192  # images whose scores are in memory at once


class Prototypes:
    """The prototypes that pretraining saved; none for methods without them.

    Args:
        encoder: Name of the encoder.
        device: Where to compute.
    """

    def __init__(self, encoder: str, device: torch.device) -> None:
        folder = layout.out("pretrain", encoder)
        self._prototypes: dict[str, Tensor] = {}
        path, projection = folder / "prototypes.safetensors", folder / "projection.safetensors"
        if not (path.exists() or projection.exists()):
            return
        features: int = read.record(folder / "encoder.json", {"feature_dim": Count})["feature_dim"]
        try:
            self._head = heads.load_projection(weights.load(projection)).to(device)
            first, *_, last = (parameter.shape for parameter in self._head.parameters())
            if first[1] != features:
                raise CheckpointError(f"expected a head of {features} features, got one of {first[1]}")
        except CheckpointError as error:
            raise read.damaged(projection, f"{projection} is damaged: {error}") from error
        try:
            stored = weights.load(path)
            if not all(
                name.isdecimal() and rows.is_floating_point() and rows.shape[1:] == last
                for name, rows in stored.items()
            ):
                raise CheckpointError(f"expected numbered prototypes of {last[0]} dimensions, got others")
        except CheckpointError as error:
            raise read.damaged(path, f"{path} is damaged: {error}") from error
        self._prototypes = {name: stored[name].to(device) for name in sorted(stored, key=int)}

    def assign(self, features: Tensor) -> Assignments:
        """Strongest prototype of each image and its score, for each head.

        Args:
            features: The backbone's outputs (N, D), not normalised; a memory map is read part by part.
        """
        found = {}
        for name, rows in self._prototypes.items():
            best = [
                heads.prototype_scores(self._head, rows, part.to(rows.device)).max(1)
                for part in torch.split(features, _ROWS)
            ]
            found[name] = (
                torch.cat([part.indices for part in best]).cpu().numpy(),
                torch.cat([part.values for part in best]).cpu().numpy(),
            )
        return found

    def score(self, assigned: dict[str, Assignments], splits: dict[str, prepared.Split]) -> dict[str, Any]:
        """Metrics of each head's clustering of the test images.

        `k`; `used`, the share of prototypes with a test image; with labels `nmi`, `ari`, and `majority`, the accuracy
        when each prototype stands for the most frequent class among its labelled training images.
        """
        labels = {split: splits[split].labels for split in layout.SPLITS}
        known = {split: labels[split] >= 0 for split in layout.SPLITS}
        scores: dict[str, dict[str, Any]] = {}
        for name, rows in self._prototypes.items():
            train, test = (assigned[split][name][0] for split in ("train", "test"))
            scores[name] = {"k": len(rows), "used": len(np.unique(test)) / min(len(rows), len(test))}
            if known["train"].any() and known["test"].any():
                counts = np.zeros((len(rows), 1 + max(int(each.max()) for each in labels.values())), dtype=np.int64)
                np.add.at(counts, (train[known["train"]], labels["train"][known["train"]]), 1)
                clusters, truth = test[known["test"]], labels["test"][known["test"]]
                scores[name] |= {"nmi": metrics.nmi(truth, clusters), "ari": metrics.ari(truth, clusters)}
                scores[name]["majority"] = float((counts.argmax(1)[clusters] == truth).mean())
        return scores


def rows(assigned: dict[str, Assignments], splits: dict[str, prepared.Split]) -> list[dict[str, Any]]:
    """The table of assignments, one row an image and head."""
    return [
        dict(zip(COLUMNS, (split, index, path, name, prototype, score), strict=True))
        for split in layout.SPLITS
        for name, (clusters, scores) in assigned[split].items()
        for index, (path, prototype, score) in enumerate(
            zip(splits[split].paths, clusters.tolist(), scores.tolist(), strict=True)
        )
    ]
