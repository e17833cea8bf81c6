"""The model that MLflow loads: images of any size to embedding, cluster and, where there is a classifier, class.

    model = mlflow.pyfunc.load_model("models:/deepclust-swav@champion")
    table = model.predict(images)  # (N, H, W, C) uint8

This file is itself the model's definition ("models from code"). MLflow stores it with the files that it reads:
safetensors, npy, JSON and the source of the preprocessing. Nothing is pickled.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from mlflow.pyfunc import PythonModel, PythonModelContext
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from deepclust import encoder, features, kmeans
from deepclust.devices import default_device

BATCH = 256


class DeepclustModel(PythonModel):  # type: ignore[misc]  # MLflow has no types
    """Prepares images as the stage `prepare` does, embeds, assigns and classifies them."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the files that were stored with the model."""
        folder = Path(context.artifacts["files"])
        self._device = torch.device((context.model_config or {}).get("device") or default_device())
        self._encoder = encoder.load(folder).to(self._device)
        self._resize = _json(folder / "statistics.json")["resize"]
        # By path, not as a package of the pipeline: whoever loads the model may have a package `tasks` of their own.
        self._square = runpy.run_path(str(folder / "decode.py"))["square"]
        self._centroids = torch.from_numpy(np.load(folder / "centroids.npy", allow_pickle=False))
        self._normalise = bool(_json(folder / "cluster.json")["normalise"])
        self._classes: list[str] = _json(folder / "classifier.json")["classes"]
        self._classifier = load_file(folder / "classifier.safetensors") if self._classes else {}

    # The bare array is the one hint that MLflow does not take for a schema of its own, and does not warn of.
    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Embed, assign and classify images.

        Args:
            context: Unused; MLflow passes it.
            model_input: (N, H, W, C) uint8, C 1 or 3, of any height and width; or an object array of N images
                (H, W, C) or (H, W) of different sizes.
            params: Unused; MLflow passes it.

        Returns:
            One row an image: `embedding` (D floats), `cluster`, `distance` to its centroid; with a classifier also
            `class`, its `probability`, and `probabilities` of all classes in the order of the model's metadata.

        Raises:
            ValueError: If the images are no such arrays.
        """
        embeddings = torch.from_numpy(
            features.extract(self._encoder, self._prepared(model_input), batch_size=BATCH, device=self._device)
        )
        points = F.normalize(embeddings, dim=1) if self._normalise else embeddings
        clusters, squared = kmeans.assign(points, self._centroids)
        columns: dict[str, Any] = {
            "embedding": list(embeddings.numpy()),
            "cluster": clusters.numpy(),
            "distance": squared.sqrt().numpy(),
        }
        if self._classes:
            scores = F.linear(embeddings, self._classifier["weight"], self._classifier["bias"])
            probabilities = scores.softmax(dim=1).numpy()
            columns["class"] = [self._classes[index] for index in probabilities.argmax(axis=1)]
            columns["probability"] = probabilities.max(axis=1)
            columns["probabilities"] = list(probabilities)
        return pd.DataFrame(columns)

    def _prepared(self, images: Any) -> NDArray[np.uint8]:
        """(N, size, size, channels) uint8, unchanged if the images have that shape already."""
        size, channels = (int(self._encoder.description[key]) for key in ("image_size", "channels"))
        if isinstance(images, np.ndarray) and images.shape[1:] == (size, size, channels) and images.dtype == np.uint8:
            return images
        return np.stack(
            [self._square(_picture(image), image_size=size, channels=channels, resize=self._resize) for image in images]
        )


def _picture(image: Any) -> Image.Image:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,)) or not array.size:
        raise ValueError(
            "expected images (height, width), (height, width, 1) or (height, width, 3) uint8, got "
            f"{array.shape} {array.dtype}; convert them, for instance with PIL's convert('RGB')"
        )
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


mlflow.models.set_model(DeepclustModel())
