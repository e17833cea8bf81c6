"""The model that MLflow loads: images of any size to embedding, cluster and, where there is a classifier, class.

    model = mlflow.pyfunc.load_model("models:/deepclust-swav@champion")
    table = model.predict(images)  # (N, H, W, C) uint8

This file is the model's definition ("models from code"), which MLflow stores with the library and the files that it
reads: safetensors, npy and JSON. Nothing is pickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext
from numpy.typing import NDArray
from PIL import Image

from deepclust import bundle
from deepclust.images.decode import square

BATCH = 256


class DeepclustModel(PythonModel):  # type: ignore[misc]  # MLflow has no types
    """Prepares images as the stage `prepare` does, embeds, assigns and classifies them."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the files that were stored with the model."""
        folder = Path(context.artifacts["files"])
        device = (context.model_config or {}).get("device")
        self._bundle = bundle.load(folder, device=torch.device(device) if device else None)

    # MLflow makes a schema of any other type hint, or warns of it.
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
        found = self._bundle.assign(self._prepared(model_input), batch_size=BATCH)
        columns: dict[str, Any] = {"embedding": list(found.features)}
        columns |= {"cluster": found.clusters, "distance": found.distances}
        if found.probabilities is not None:
            columns["class"] = [self._bundle.classes[index] for index in found.probabilities.argmax(axis=1)]
            columns["probability"] = found.probabilities.max(axis=1)
            columns["probabilities"] = list(found.probabilities)
        return pd.DataFrame(columns)

    def _prepared(self, images: Any) -> NDArray[np.uint8]:
        """(N, size, size, channels) uint8, unchanged if the images have that shape already."""
        size, channels, resize = self._bundle.image_size, self._bundle.channels, self._bundle.reading.resize
        if isinstance(images, np.ndarray) and images.shape[1:] == (size, size, channels) and images.dtype == np.uint8:
            return images
        how: Any = {"image_size": size, "channels": channels, "resize": resize}
        return np.stack([square(_picture(image), **how) for image in images])


def _picture(image: Any) -> Image.Image:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,)) or not array.size:
        raise ValueError(
            "expected images (height, width), (height, width, 1) or (height, width, 3) uint8, got "
            f"{array.shape} {array.dtype}; convert them, for instance with PIL's convert('RGB')"
        )
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)


mlflow.models.set_model(DeepclustModel())
