"""The registered model against the same computation by hand in float64."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.special import softmax

from deepclust.clustering import assigners, confidence
from deepclust.models import encoder as encoders
from tasks.model import register
from tasks.shared.operations import provenance
from tasks.shared.outputs import layout, lineage
from tests.imports import imported
from tests.paths import ROOT


@pytest.fixture(scope="module")
def root(labelled: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Inside a workspace with a labelled encoder, registered."""
    root = shutil.copytree(labelled, tmp_path_factory.mktemp("model") / "copy")
    shutil.copy(empty_store, root)
    for path in root.rglob(lineage.FILE):  # for the tests change the files
        path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        register.register("swav")
        yield root


def load(encoder: str = "swav") -> Any:
    import mlflow

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    return mlflow.pyfunc.load_model(f"models:/deepclust-{encoder}@champion", model_config={"device": "cpu"})


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
        assert list(table.columns) == ["embedding", "cluster", "distance", "confidence"]
        return
    head = {key: value.double().numpy() for key, value in load_file(path).items()}
    probabilities = softmax(embedding @ head["weight"].T + head["bias"], axis=1)
    np.testing.assert_allclose(np.stack(table["probabilities"]), probabilities, rtol=1e-4)
    assert list(table["class"]) == [f"kind{index}" for index in probabilities.argmax(axis=1)]
    np.testing.assert_allclose(table["probability"], probabilities.max(axis=1), rtol=1e-4)


def test_predictions_are_those_of_encoder_centroids_and_classifier_for_images_of_any_size_and_mode(root: Path) -> None:
    images = np.load(layout.images(16) / "test.npy")
    model = load()
    check(model.predict(images), images)
    others = np.random.default_rng(0).integers(0, 256, (5, 30, 30, 3), dtype=np.uint8)
    prepared = [np.asarray(Image.fromarray(image).resize((16, 16), 3)) for image in others]
    check(model.predict(others), np.stack(prepared))
    ragged = np.array([others[0], others[1, :20, :, 0]], dtype=object)
    assert len(model.predict(ragged)) == 2
    alike = np.empty(2, object)
    alike[:] = [others[0], others[1]]
    check(model.predict(alike), np.stack(prepared[:2]))
    check(model.predict(others.astype(np.float32)), np.stack(prepared))
    assert len(model.predict(np.zeros((1, 9, 9, 1), np.uint8) + 1)) == 1, "in uint8, 1 is nearly black"
    with pytest.raises(
        ValueError, match=r"^expected whole numbers from 0 to 255, got fractions, 0 to 1; images scaled"
    ):
        model.predict(others / 255)


def test_what_the_clusters_reject_has_none_in_python_and_over_http(
    labelled: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(labelled, tmp_path / "copy"))
    for path in [*Path().rglob(lineage.FILE)]:
        path.unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/copy/mlflow.db")
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    shutil.copy(root / "mlflow.db", "mlflow.db")
    train = torch.from_numpy(np.load(layout.embeddings("pixels", "train")))
    head = assigners.classifier(train, torch.arange(len(train)) % 3, 3)
    fitted = confidence.fit(head, train, normalise=False, algorithm="spectral", reject=0.5)[0]
    fitted.save(layout.out("cluster", "pixels"))
    register.register("pixels")
    model, images = load("pixels"), np.load(layout.images(16) / "train.npy")
    table = model.predict(images)
    judged = fitted.judge(train)
    clear = np.abs(judged.scores.numpy() - fitted.reject) > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(table["cluster"][clear], fitted.kept(judged).numpy()[clear])
    assert len(set(table["cluster"])) == 4
    np.testing.assert_allclose(table["confidence"], judged.scores, rtol=1e-3)
    status, text = serve(model)({"inputs": images.tolist()})
    assert status == 200
    assert [row["cluster"] for row in json.loads(text)["predictions"]] == table["cluster"].tolist()


@pytest.fixture(scope="module")
def send(root: Path) -> Iterator[Any]:
    """What MLflow's scoring server answers to a body: the status and the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # which the server sets for good
        yield serve(load())


def serve(model: Any) -> Any:
    """A function that sends a body to MLflow's scoring server."""
    from fastapi.testclient import TestClient
    from mlflow.pyfunc import scoring_server

    client = TestClient(scoring_server.init(model), raise_server_exceptions=False)

    def answer(body: Any, content: str = "application/json") -> tuple[int, str]:
        text = body if isinstance(body, str) else json.dumps(body)
        found = client.post("/invocations", content=text, headers={"content-type": content})
        return found.status_code, found.text

    return answer


def test_over_http_whole_numbers_are_the_images_that_they_are_in_python(root: Path, send: Any) -> None:
    images = np.load(layout.images(16) / "test.npy")[:3]
    numbers: dict[str, Any] = {
        "inputs": images.tolist(),
        "instances": images.astype(float).tolist(),  # 12.0 is a whole number too
    }
    for name, value in numbers.items():
        status, text = send({name: value})
        assert status == 200
        check(pd.DataFrame(json.loads(text)["predictions"]), images)
    assert send({"instances": [{"images": image} for image in images.tolist()]}) == (status, text)
    sizes = [images[0].tolist(), np.kron(images[1], np.ones((2, 2, 1), int)).tolist()]
    assert [row["cluster"] for row in json.loads(send({"inputs": sizes})[1])["predictions"]] == [
        row["cluster"] for row in json.loads(text)["predictions"][:2]
    ]
    example = next((root / "mlartifacts").rglob("serving_input_example.json")).read_text()
    assert send(example)[0] == 200


PICTURES = np.random.default_rng(0).integers(0, 256, (2, 12, 10, 3))
SHAPE = r"expected images \(N, height, width, channels\) with 1 or 3 channels, got "
VALUES = "expected whole numbers from 0 to 255, got "


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (PICTURES / 255, VALUES + r"fractions, .* to 1; images scaled to \[0, 1\] have to be multiplied by 255"),
        (PICTURES // 128, VALUES + r"0 to 1; images scaled to \[0, 1\]"),
        (PICTURES / 127.5 - 1, VALUES + "fractions, -1 to 1; give the pixels as they were before any scaling"),
        (-PICTURES, VALUES + "-255 to 0; give the pixels"),
        (PICTURES * 16, VALUES + "0 to 4080; give the pixels .* in 8 bits"),
        (PICTURES * 0.9, VALUES + "fractions, 0 to 229.5; round them"),
        (PICTURES * float("nan"), VALUES + "fractions, nan to nan"),
        (PICTURES > 9, VALUES + "bool; convert them"),
        (PICTURES.astype(str), VALUES + "str; convert them"),
        (PICTURES.transpose(0, 3, 1, 2), SHAPE + r"\(2, 3, 12, 10\); move the channels last: .*\(0, 2, 3, 1\)"),
        (PICTURES[0], SHAPE + r"\(12, 10, 3\); add N to a single image, images\[None\]"),
        (PICTURES[..., 0], SHAPE + r"\(2, 12, 10\); .* or the channels to grey images"),
        (PICTURES[0, ..., 0], SHAPE + r"\(12, 10\); send a single grey image as images\[None, ..., None\]"),
        *((np.zeros((1, 9, 9, n), int), SHAPE + rf"\(1, 9, 9, {n}\); make them grey or RGB") for n in (2, 4, 5)),
        ([], SHAPE + r"\(0,\), which has no pixels; send at least one image"),
        ([[]], SHAPE + r"\(1, 0\), which has no pixels"),
        ([[[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]]], SHAPE + "rows of different lengths in one image; complete them"),
        ([PICTURES[0].tolist(), (PICTURES[1, :5] / 255).tolist()], VALUES + "fractions, .*; images scaled"),
        ([PICTURES[0].tolist(), PICTURES[:1].tolist()], SHAPE + r"an image \(1, 12, 10, 3\); arrange them so"),
        ([PICTURES[0].tolist(), PICTURES[1].T.tolist()], SHAPE + r"an image \(3, 10, 12\); move the channels last"),
        (7, SHAPE + r"\(\); arrange"),
        ([1, [2]], SHAPE + r"an image \(\); arrange"),
        (None, SHAPE + r"\(\); arrange"),
    ],
)
def test_over_http_other_images_are_refused_in_one_line_with_the_remedy(send: Any, inputs: Any, message: str) -> None:
    status, text = send({"inputs": inputs.tolist() if isinstance(inputs, np.ndarray) else inputs})
    assert status == 400
    assert re.match(message, json.loads(text)["message"])
    assert "\\n" not in text


def test_deep_images_have_the_white_of_the_training_images_in_python_and_over_http(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    stored = json.loads(layout.statistics("random").read_text())
    layout.statistics("random").write_text(json.dumps(stored | {"white": {"uint16": [0, 1023], "float32": [-1, 1]}}))
    register.register("random")
    layout.statistics("random").write_text(json.dumps(stored))
    model = load("random")
    shallow = np.load(layout.images(16) / "test.npy")[:3]
    deep = np.rint(shallow / 255 * 1023).astype(np.uint16)
    expected = np.stack(model.predict(shallow)["embedding"])
    assert not np.allclose(expected[0], expected[1])
    np.testing.assert_allclose(np.stack(model.predict(deep)["embedding"]), expected, rtol=1e-5, atol=1e-6)
    signed = (shallow / 127.5 - 1).astype(np.float32)
    np.testing.assert_allclose(np.stack(model.predict(signed)["embedding"]), expected, rtol=1e-5, atol=1e-6)
    send = serve(model)
    status, text = send({"inputs": deep.tolist(), "params": {"depth": "uint16"}})
    assert status == 200
    found = np.array([row["embedding"] for row in json.loads(text)["predictions"]])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert send({"inputs": shallow.tolist(), "params": {"depth": "uint8"}})[0] == 200
    for body in ({"inputs": deep.tolist()}, {"inputs": deep.tolist(), "params": {"depth": "uint12"}}):
        status, text = send(body)
        assert status == 400
        assert "expected pixels of uint8 or uint16 or float32, got" in text


def test_over_http_tables_are_refused_and_named(send: Any) -> None:
    for body in ({"dataframe_split": {"columns": ["a"], "data": [[1]]}}, {"instances": [{"image": [[[[1]]]]}]}):
        status, text = send(body)
        assert status == 400
        assert "missing inputs ['images']" in json.loads(text)["message"]
    assert send("a,b\n1,2\n", "text/csv")[0] == 400
    assert send("a,b\n1,2\n", "text/plain")[0] == 415


def test_grey_images_reach_a_larger_network_of_three_channels_and_without_labels_there_is_no_class(
    root: Path, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(unlabelled, tmp_path / "copy"))
    for path in [*Path().rglob(lineage.FILE)]:
        path.unlink()
    for split in layout.SPLITS:
        path = layout.images(16) / f"{split}.npy"
        np.save(path, np.load(path)[..., :1])
    layout.statistics("swav").write_text(
        json.dumps(json.loads(layout.statistics("swav").read_text()) | {"channels": 1})
    )
    shape: dict[str, Any] = {"image_size": 16, "channels": 1, "network_channels": 3, "input_size": 24}
    torch.manual_seed(0)
    wide = encoders.Encoder(backbone="small", mean=[0.4] * 3, std=[0.2] * 3, **shape)
    encoders.save(wide.eval(), layout.out("pretrain", "swav"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/copy/mlflow.db")
    shutil.copy(root / "mlflow.db", "mlflow.db")
    register.register("swav")
    images = np.load(layout.images(16) / "test.npy")
    check(load().predict(images), images)


def test_the_stored_model_has_no_pickle_and_loads_in_a_process_that_knows_nothing_of_the_repository(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = json.loads(load().metadata.signature.to_dict()["inputs"])
    assert inputs == [{"name": "images", "type": "tensor", "tensor-spec": {"dtype": "object", "shape": [-1]}}]
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
    columns = ["class", "cluster", "confidence", "distance", "embedding", "probabilities", "probability"]
    assert done.stdout == f"2 {columns}\n"


def test_what_the_stored_code_imports_is_among_its_requirements() -> None:
    files = [ROOT / file for source in register._STORED for file in provenance.source_files(source)]
    packages = {name.partition(".")[0] for file in files for name in imported(file)}
    # A stored model fetches nothing, and fits no clusters.
    others = packages - sys.stdlib_module_names - {"deepclust", "huggingface_hub", "faiss"}
    distributions = {"PIL": "pillow", "pydantic_core": "pydantic"}
    assert {distributions.get(name, name) for name in others} == {*register._REQUIRED, "timm"}
