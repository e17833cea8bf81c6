"""The classifiers of an encoder: each is what the stage it comes from computed, or says why there is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from deepclust.clustering import kmeans
from deepclust.errors import CheckpointError
from deepclust.evaluation.probing import LinearClassifier
from deepclust.models import encoder as encoders
from deepclust.models import features
from deepclust.models.features import to_float
from tasks.adapt import classifiers
from tasks.shared.operations import params
from tasks.shared.operations.params import schema
from tasks.shared.outputs import layout
from tests.tasks import shift_workspace

CPU = torch.device("cpu")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shift_workspace.build(tmp_path)
    return tmp_path


def build(kind: str, encoder: str = "swav") -> classifiers.Found:
    source_images = torch.split(to_float(torch.from_numpy(np.load(layout.split("train") / "images.npy"))), 40)
    return classifiers.build(kind, encoder, values(), source_images)


def values(rate: float = 0.01) -> schema.Params:
    found = params.load()
    tune = found.adapt.fine_tune.model_copy(update={"epochs": 4, "batch_size": 16, "rate": rate})
    return found.model_copy(update={"adapt": found.adapt.model_copy(update={"fine_tune": tune})})


def shown() -> tuple[np.ndarray, torch.Tensor]:
    images = np.load(layout.split("test") / "images.npy")
    return images, to_float(torch.from_numpy(images))


def embeddings(encoder: str = "swav", split: str = "test") -> torch.Tensor:
    loaded = encoders.load(layout.out("pretrain", encoder))
    images = np.load(layout.split(split) / "images.npy")
    return torch.from_numpy(features.extract(loaded, images, batch_size=9, device=CPU))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("encoder", ["swav", "pixels"])
def test_a_cluster_is_the_nearest_centroids(workspace: Path, normalise: bool, encoder: str) -> None:
    shift_workspace.cluster(encoder, normalise=normalise)
    points = embeddings(encoder)
    points = F.normalize(points, dim=1) if normalise else points
    centroids = torch.from_numpy(np.load(layout.out("cluster", encoder) / "centroids.npy"))
    expected, _ = kmeans.assign(points, centroids)
    found = build("clusters", encoder)
    assert found.model is not None
    logits = found.model(shown()[1])
    assert torch.equal(logits.argmax(1), expected)
    assert len(expected.unique()) > 1
    assert found.names == ["0", "1", "2", "3"]
    # As a softmax over -‖z - c‖² / m, in float64.
    train = embeddings(encoder, "train")
    train = F.normalize(train, dim=1) if normalise else train
    of_train, squared = (
        (these[:, None].double() - centroids[None].double()).square().sum(-1) for these in (train, points)
    )
    chances = (-squared / of_train.amin(1).mean()).softmax(1)
    torch.testing.assert_close(logits.double().softmax(1), chances, rtol=0, atol=1e-3)


def test_probabilities_of_clusters_are_the_same_for_features_of_any_scale(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift_workspace.cluster("swav", normalise=False)
    images, loaded = shown()[1], encoders.load
    one = build("clusters").model
    assert one is not None

    class Scale(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return 7 * features

    def scaled(folder: Path) -> encoders.Encoder:
        encoder = loaded(folder)
        encoder.backbone = torch.nn.Sequential(encoder.backbone, Scale())
        return encoder

    monkeypatch.setattr(encoders, "load", scaled)
    file = layout.out("cluster", "swav") / "centroids.npy"
    np.save(file, 7 * np.load(file))
    seven = build("clusters").model
    assert seven is not None
    torch.testing.assert_close(seven.featurizer(images), 7 * one.featurizer(images))
    chances = one(images).softmax(1)
    torch.testing.assert_close(seven(images).softmax(1), chances, rtol=0, atol=1e-4)
    assert 0.4 < chances.amax(1).mean() < 0.95


def test_features_that_all_are_centroids_have_finite_logits() -> None:
    centroids = torch.eye(3)
    logits = classifiers.nearest_centroid(centroids, centroids)(centroids)
    assert torch.equal(logits.argmax(1), torch.arange(3))
    assert torch.isfinite(logits).all()


def test_linear_is_the_linear_stages_classifier_on_the_embeddings(workspace: Path) -> None:
    weights = load_file(layout.out("linear", "swav") / "classifier.safetensors")
    expected = LinearClassifier(weights["weight"], weights["bias"]).predict(embeddings())
    found = build("linear")
    assert found.model is not None
    assert torch.equal(found.model(shown()[1]).argmax(1), expected)
    assert len(expected.unique()) > 1
    assert found.names == ["a", "b", "c"]
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    assert not any(module.training for module in found.model.modules())


def test_fine_tuning_lowers_the_error_on_the_training_images_and_is_the_same_twice(workspace: Path) -> None:
    images = to_float(torch.from_numpy(np.load(layout.split("train") / "images.npy")))
    labels = np.load(layout.split("train") / "labels.npy")
    found = {kind: build(kind).model for kind in ("linear", "fine_tuned")}
    error = {kind: (model(images).argmax(1).numpy() != labels).mean() for kind, model in found.items() if model}
    assert error["linear"] > 0.05
    assert error["fine_tuned"] < error["linear"] / 2
    again = build("fine_tuned").model
    assert again is not None
    one = found["fine_tuned"]
    assert one is not None
    assert all(torch.equal(left, right) for left, right in zip(one.parameters(), again.parameters(), strict=True))


def test_the_random_numbers_of_dropout_are_seeded(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = encoders.load

    def with_dropout(folder: Path) -> encoders.Encoder:
        encoder = loaded(folder)
        encoder.backbone = torch.nn.Sequential(encoder.backbone, torch.nn.Dropout())
        return encoder

    monkeypatch.setattr(encoders, "load", with_dropout)
    one, two = (build("fine_tuned").model for _ in range(2))
    assert one is not None
    assert two is not None
    assert torch.equal(one.head.weight, two.head.weight)


def test_where_there_is_no_classifier_the_reason_is_said(workspace: Path) -> None:
    assert build("fine_tuned", "pixels") == classifiers.Found(None, [], "the encoder has no parameters to fine-tune")
    folder = layout.out("linear", "swav")
    save_file({"weight": torch.zeros(1, 128), "bias": torch.zeros(1)}, folder / "classifier.safetensors")
    (folder / "classifier.json").write_text(json.dumps({"classes": ["a"]}))
    for kind in ("linear", "fine_tuned"):
        assert build(kind) == classifiers.Found(None, [], "a single class, which no classifier can get wrong")
    (folder / "classifier.safetensors").unlink()
    (folder / "classifier.json").write_text(json.dumps({"classes": []}))
    for kind in ("linear", "fine_tuned"):
        assert build(kind).reason == "no labelled training images, so there is no classifier"
    assert build("clusters").model is not None


def fails(kind: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        build(kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("classifier.safetensors", b"not weights"),
        ("classifier.json", b"{"),
        ("classifier.json", b"[]"),
        ("classifier.json", b"{}"),
        ("classifier.json", b"\xff\xfe"),
    ],
)
def test_a_damaged_linear_classifier_is_one_line(workspace: Path, file: str, content: bytes) -> None:
    (layout.out("linear", "swav") / file).write_bytes(content)
    fails("linear", r"^the classifier in artifacts/linear/swav is damaged \(.*run its linear stage again$")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("centroids.npy", b"no array"),
        ("centroids.npy", b""),
        ("cluster.json", b"{"),
        ("cluster.json", b"[]"),
        ("cluster.json", b"{}"),
        ("cluster.json", b"3"),
    ],
)
def test_damaged_centroids_are_one_line(workspace: Path, file: str, content: bytes) -> None:
    (layout.out("cluster", "swav") / file).write_bytes(content)
    fails("clusters", r"^the clusters in artifacts/cluster/swav are damaged \(.*run its cluster stage again$")


def test_centroids_that_are_no_numbers_are_one_line(workspace: Path) -> None:
    np.save(layout.out("cluster", "swav") / "centroids.npy", np.array(["a", "b"]))
    fails("clusters", r"are damaged \(")


@pytest.mark.parametrize(("kind", "stage"), [("linear", "linear"), ("clusters", "cluster"), ("fine_tuned", "linear")])
def test_missing_outputs_name_the_stage_to_run(workspace: Path, kind: str, stage: str) -> None:
    for file in list(layout.out(stage, "swav").iterdir()):
        file.unlink()
        fails(kind, rf"in artifacts/{stage}/swav, found none; run its {stage} stage$")


def test_outputs_of_other_features_are_refused(workspace: Path) -> None:
    np.save(layout.out("cluster", "swav") / "centroids.npy", np.zeros((4, 7), np.float32))
    fails("clusters", r"expected centroids \(clusters, 128\) .* got \(4, 7\); .*run its embed and cluster stages again")
    file = layout.out("linear", "swav") / "classifier.safetensors"
    save_file({"weight": torch.zeros(3, 7), "bias": torch.zeros(3)}, file)
    fails("linear", r"expected a classifier .* got \(3, 7\) and bias \(3,\); .*run its embed and linear")
