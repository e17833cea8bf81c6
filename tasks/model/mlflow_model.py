"""The model that MLflow loads: images of any size to embedding, cluster and, where there is a classifier, class.

    model = mlflow.pyfunc.load_model("models:/deepclust-swav@champion")
    table = model.predict(images)  # (N, H, W, C) uint8

This file is the model's definition ("models from code"), which MLflow stores with the library and the files that it
reads: safetensors, npy and JSON. Nothing is pickled. MLflow's scoring server casts what it is sent to the signature's
type before the model sees it, so the signature leaves the values as they are, and the model checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import Array
from numpy.typing import NDArray
from PIL import Image

from deepclust import bundle
from deepclust.images import depth
from deepclust.images.reading import square

BATCH = 256
INPUT, DEPTH = "images", "depth"  # their names in the signature
_LAYOUT = "expected images (N, height, width, channels) with 1 or 3 channels"
_VALUES = "expected whole numbers from 0 to 255"


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
            model_input: (N, H, W, C), C 1 or 3, of any height and width; or an object array of N images (H, W, C) or
                (H, W) of different sizes. uint8, or whole numbers from 0 to 255 of another type.
            params: `depth` names the depth of the pixels where their type does not say it, as over HTTP: `uint16`, or
                another of more than 8 bits that the training images had.

        Returns:
            One row an image: `embedding` (D floats), `cluster` (-1 where `confidence` is below the threshold of the
            clusters), `distance` to its centroid, `confidence` from 0 to 1; with a classifier also `class`, its
            `probability`, and `probabilities` of all classes in the order of the model's metadata.

        Raises:
            ImagesError: If the images are no such arrays.
        """
        found = self._bundle.assign(self._prepared(model_input, (params or {}).get(DEPTH)), batch_size=BATCH)
        columns: dict[str, Any] = {"embedding": list(found.features)}
        columns |= {"cluster": found.clusters, "distance": found.distances, "confidence": found.confidences}
        if found.probabilities is not None:
            columns["class"] = [self._bundle.classes[index] for index in found.probabilities.argmax(axis=1)]
            columns["probability"] = found.probabilities.max(axis=1)
            columns["probabilities"] = list(found.probabilities)
        return pd.DataFrame(columns)

    def _prepared(self, given: Any, named: str | None) -> NDArray[np.uint8]:
        """(N, size, size, channels) uint8, unchanged if the images have that shape already."""
        size, channels, resize = self._bundle.image_size, self._bundle.channels, self._bundle.reading.resize
        to_pixels = partial(to_8_bits, named=named, white=self._bundle.reading.white)
        images = read(given[INPUT] if isinstance(given, dict) else given, to_pixels)
        if isinstance(images, np.ndarray) and images.shape[1:] == (size, size, channels):
            return images
        how: Any = {"image_size": size, "channels": channels, "resize": resize}
        return np.stack([square(_picture(image), **how) for image in images])


class ImagesError(MlflowException, ValueError):  # type: ignore[misc]  # MLflow has no types
    """Images that the model does not take: a ValueError in Python, status 400 over HTTP."""

    def __init__(self, message: str) -> None:
        MlflowException.__init__(self, message, error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        """The answer over HTTP. The scoring server has put all of the data in front of the message by then."""
        self.message = str(self)
        return str(super().serialize_as_json())


def signature(*, labelled: bool) -> ModelSignature:
    """What the model takes and gives, as the registry shows it.

    A list of objects stands for arrays of any shape and type, of which MLflow changes no value. Since it has a name,
    MLflow also hands on an empty list, and says what a table lacks.

    Args:
        labelled: Whether the model also gives classes.
    """
    outputs = [ColSpec(Array("float"), "embedding"), ColSpec("long", "cluster"), ColSpec("float", "distance")]
    outputs += [ColSpec("float", "confidence")]
    if labelled:
        outputs += [ColSpec("string", "class"), ColSpec("float", "probability")]
        outputs += [ColSpec(Array("float"), "probabilities")]
    inputs = Schema([TensorSpec(np.dtype(object), (-1,), INPUT)])
    return ModelSignature(inputs, Schema(outputs), ParamSchema([ParamSpec(DEPTH, "string", "")]))


def read(
    given: Any, to_pixels: Callable[[NDArray[Any]], NDArray[np.uint8]]
) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
    """Images (N, H, W, C), or N images (H, W, C) or (H, W) where these come one by one, in uint8.

    Args:
        given: What was sent.
        to_pixels: Brings values to 8 bits.

    Raises:
        ImagesError: If there are none, or their shape or values do not fit.
    """
    array = np.asarray(given)
    if array.dtype == object and array.ndim == 1 and len(array):
        return [to_pixels(_shaped(_numbers(image), batch=False)) for image in array]
    return to_pixels(_shaped(_numbers(array), batch=True))


def _numbers(given: Any) -> NDArray[Any]:
    """An array of the type of what it holds, such as the numbers of JSON, of which MLflow makes objects."""
    try:
        array = np.asarray(given)
        return np.array(array.tolist()) if array.dtype == object else array
    except ValueError:
        raise ImagesError(f"{_LAYOUT}, got rows of different lengths in one image; complete them") from None


def _shaped(array: NDArray[Any], *, batch: bool) -> NDArray[Any]:
    """The array, which is (N, H, W, C) with `batch`, else one image."""
    shape = array.shape if batch or array.ndim != 2 else (*array.shape, 1)
    got = f"got {'' if batch else 'an image '}{array.shape}"
    if not array.size:
        raise ImagesError(f"{_LAYOUT}, {got}, which has no pixels; send at least one image, and no empty ones")
    if len(shape) != 3 + batch or shape[-1] not in (1, 3):
        raise ImagesError(f"{_LAYOUT}, {got}; {_remedy(array.shape, batch=batch)}")
    return array


def _remedy(shape: tuple[int, ...], *, batch: bool) -> str:
    if len(shape) == 3 + batch:
        if shape[-3] in (1, 3):
            return f"move the channels last: images.transpose({'0, 2, 3, 1' if batch else '1, 2, 0'})"
        return "make them grey or RGB, for instance by PIL's convert('RGB')"
    if len(shape) == 3:
        return "add N to a single image, images[None], or the channels to grey images, images[..., None]"
    return "send a single grey image as images[None, ..., None]" if len(shape) == 2 else "arrange them so"


def to_8_bits(pixels: NDArray[Any], *, named: str | None, white: Mapping[str, depth.Range]) -> NDArray[np.uint8]:
    """Pixels of any depth that the training images had, as uint8.

    Args:
        pixels: Of any shape.
        named: The depth that the sender names, if so.
        white: Black and white of each depth above 8 bits.

    Raises:
        ImagesError: If the training images had no such depth, it is not clear which is meant, or a value does not fit.
    """
    known = ["uint8", *white]
    name = named or pixels.dtype.name
    if (named and named not in known) or (name not in known and white):
        raise ImagesError(
            f"expected pixels of {' or '.join(known)}, got {name}; convert them, and where their type does not say it, "
            f'name it in the parameter {DEPTH!r}, as in {{"params": {{"{DEPTH}": "{known[-1]}"}}}}'
        )
    if name not in white:
        return to_uint8(pixels)
    if pixels.dtype.kind not in "iuf" or not np.isfinite(pixels).all():
        raise ImagesError(f"expected finite numbers of {name}, got others; replace them")
    return depth.scaled(pixels, white[name])


def to_uint8(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels as uint8, where that changes no value and says no other brightness.

    Raises:
        ImagesError: If they are no whole numbers from 0 to 255, or of another type and at most 1, as images are that
            were scaled to [0, 1].
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "iuf":
        raise ImagesError(f"{_VALUES}, got {pixels.dtype.type.__name__.rstrip('_')}; convert them")
    low, high = pixels.min(), pixels.max()
    whole = bool((pixels == np.rint(pixels)).all())
    if whole and low >= 0 and high <= 255 and high != 1:
        return pixels.astype(np.uint8)
    if low >= 0 and high <= 1:
        remedy = "images scaled to [0, 1] have to be multiplied by 255, and rounded"
    elif low >= 0 and high <= 255:
        remedy = "round them"
    else:
        remedy = "give the pixels as they were before any scaling, in 8 bits"
    raise ImagesError(f"{_VALUES}, got {'' if whole else 'fractions, '}{low:.6g} to {high:.6g}; {remedy}")


def _picture(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image)


mlflow.models.set_model(DeepclustModel())
