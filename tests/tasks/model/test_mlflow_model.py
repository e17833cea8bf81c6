"""The registered model against the same computation by hand in float64."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.special import softmax

from deepclust.models import encoder as encoders
from tasks.model import register
from tasks.shared.outputs import layout


@pytest.fixture(scope="module")
def root(labelled: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Inside a workspace with a labelled encoder, registered."""
    root = shutil.copytree(labelled, tmp_path_factory.mktemp("model") / "copy")
    shutil.copy(empty_store, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        register.register("swav")
        yield root


def load() -> Any:
    import mlflow

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    return mlflow.pyfunc.load_model("models:/deepclust-swav@champion", model_config={"device": "cpu"})


def check(table: Any, images: np.ndarray) -> None:
    """Against encoder, nearest centroid and softmax in numpy float64."""
    encoder = encoders.load(layout.out("pretrain", "swav")).double()
    encoder.mean, encoder.std = encoder.mean.double(), encoder.std.double()
    embedding = encoder(torch.from_numpy(images.transpose(0, 3, 1, 2) / 255)).numpy()
    centroids = np.load(layout.out("cluster", "swav") / "centroids.npy").astype(np.float64)
    distances = np.linalg.norm(embedding[:, None] - centroids[None], axis=2)
    np.testing.assert_allclose(np.stack(table["embedding"]), embedding, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(table["cluster"], distances.argmin(axis=1))
    np.testing.assert_allclose(table["distance"], distances.min(axis=1), rtol=1e-4)
    path = layout.out("linear", "swav") / "classifier.safetensors"
    if not path.exists():
        assert list(table.columns) == ["embedding", "cluster", "distance"]
        return
    head = {key: value.double().numpy() for key, value in load_file(path).items()}
    probabilities = softmax(embedding @ head["weight"].T + head["bias"], axis=1)
    np.testing.assert_allclose(np.stack(table["probabilities"]), probabilities, rtol=1e-4)
    assert list(table["class"]) == [f"kind{index}" for index in probabilities.argmax(axis=1)]
    np.testing.assert_allclose(table["probability"], probabilities.max(axis=1), rtol=1e-4)


def test_predictions_are_those_of_encoder_centroids_and_classifier_for_images_of_any_size_and_mode(root: Path) -> None:
    images = np.load(layout.split("test") / "images.npy")
    model = load()
    check(model.predict(images), images)
    others = np.random.default_rng(0).integers(0, 256, (5, 30, 30, 3), dtype=np.uint8)
    prepared = [np.asarray(Image.fromarray(image).resize((16, 16), 3)) for image in others]
    check(model.predict(others), np.stack(prepared))
    ragged = np.array([others[0], others[1, :20, :, 0]], dtype=object)
    assert len(model.predict(ragged)) == 2
    with pytest.raises(ValueError, match=r"expected images .* uint8, got \(12, 12, 2\) uint8"):
        model.predict(np.zeros((1, 12, 12, 2), np.uint8))


def test_grey_images_reach_a_larger_network_of_three_channels_and_without_labels_there_is_no_class(
    root: Path, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(unlabelled, tmp_path / "copy"))
    shape: dict[str, Any] = {"image_size": 16, "channels": 1, "network_channels": 3, "input_size": 24}
    torch.manual_seed(0)
    wide = encoders.Encoder(backbone="small", mean=[0.4] * 3, std=[0.2] * 3, **shape)
    encoders.save(wide.eval(), layout.out("pretrain", "swav"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/copy/mlflow.db")
    shutil.copy(root / "mlflow.db", "mlflow.db")
    register.register("swav")
    images = np.load(layout.split("test") / "images.npy")[..., :1]
    check(load().predict(images), images)


def test_the_stored_model_has_no_pickle_and_loads_in_a_process_that_knows_nothing_of_the_repository(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = json.loads(load().metadata.signature.to_dict()["inputs"])
    assert inputs == [{"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [-1, -1, -1, -1]}}]
    files = {path.suffix for path in (root / "mlartifacts").rglob("*") if path.is_file()}
    assert files <= {".py", ".txt", ".yaml", ".json", ".safetensors", ".npy", ""}
    requirements = next((root / "mlartifacts").rglob("requirements.txt")).read_text().split()
    assert all(line.count("==") == 1 and "+" not in line for line in requirements)

    (tmp_path / "tasks.py").write_text("'''somebody else's module of the same name'''\n")
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import mlflow, numpy, tasks
table = mlflow.pyfunc.load_model("models:/deepclust-swav@champion").predict(numpy.zeros((2, 9, 20, 3), numpy.uint8))
import deepclust
assert "mlartifacts" in deepclust.__file__, deepclust.__file__
assert "somebody" in tasks.__doc__
print(len(table), sorted(table.columns))
"""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=90)
    assert done.stderr == "", "a prediction says nothing of itself"
    assert done.stdout == "2 ['class', 'cluster', 'distance', 'embedding', 'probabilities', 'probability']\n"
