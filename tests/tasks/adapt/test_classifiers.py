"""The classifiers of an encoder: each is what the stage it comes from computed, or says why there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from deepclust.clustering import confidence
from deepclust.clustering.assigners import Assigner, Layers
from deepclust.errors import CheckpointError
from deepclust.models import encoder as encoders
from deepclust.models.features import to_float
from tasks.adapt import classifiers
from tasks.shared.operations import params
from tasks.shared.operations.params import overrides
from tasks.shared.outputs import layout
from tests.tasks import shift_workspace


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shift_workspace.build(tmp_path)
    overrides.apply([f"adapt.fine_tune.{edit}" for edit in ("epochs=4", "batch_size=16", "rate=0.01")])


def build(kind: str, encoder: str = "swav") -> Any:
    return classifiers.build(kind, encoder, params.load(), torch.split(images("train"), 40))


def images(split: str) -> torch.Tensor:
    return to_float(torch.from_numpy(np.load(layout.images(shift_workspace.SIZE) / f"{split}.npy")))


def change(patch: pytest.MonkeyPatch, what: Callable[[encoders.Encoder], object]) -> None:
    """Of each encoder that is loaded."""
    loaded = encoders.load
    patch.setattr(encoders, "load", lambda folder: (encoder := loaded(folder), what(encoder))[0])


@pytest.mark.parametrize(("encoder", "normalise"), [("swav", True), ("pixels", False)])
def test_a_cluster_is_the_nearest_centroids(encoder: str, normalise: bool) -> None:
    """As a softmax over -‖z - c‖² / m, in float64."""
    shift_workspace.cluster(encoder, normalise=normalise)
    network = encoders.load(layout.out("pretrain", encoder))
    train, test = (network(images(split)).double() for split in ("train", "test"))
    if normalise:
        train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    centroids = torch.from_numpy(np.load(layout.out("cluster", encoder) / "centroids.npy")).double()
    of_train, squared = ((points[:, None] - centroids[None]).square().sum(-1) for points in (train, test))
    found = build("clusters", encoder)
    logits = found.model(images("test"))
    assert torch.equal(logits.argmax(1), squared.argmin(1))
    assert len(logits.argmax(1).unique()) > 1
    chances = (-squared / of_train.amin(1).mean()).softmax(1)
    torch.testing.assert_close(logits.double().softmax(1), chances, rtol=0, atol=1e-3)
    assert found.names == ["0", "1", "2", "3"]


def test_probabilities_of_clusters_are_the_same_for_features_of_any_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    shift_workspace.cluster("swav", normalise=False)
    chances = build("clusters").model(images("test")).softmax(1)
    change(monkeypatch, lambda encoder: encoder.backbone.register_forward_hook(lambda _, given, features: 7 * features))
    file = layout.out("cluster", "swav") / "centroids.npy"
    np.save(file, 7 * np.load(file))
    torch.testing.assert_close(build("clusters").model(images("test")).softmax(1), chances, rtol=0, atol=1e-4)
    assert 0.4 < chances.amax(1).mean() < 0.95


@pytest.mark.parametrize(("normalise", "unit"), [(False, False), (True, False), (False, True)])
def test_a_linear_head_of_clusters_is_itself_and_other_kinds_are_not_applicable(normalise: bool, unit: bool) -> None:
    network = encoders.load(layout.out("pretrain", "swav"))
    features = network(images("train"))
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, network.feature_dim, generator=random), torch.randn(4, generator=random)
    points = F.normalize(features, dim=1) if normalise else features

    def save(assigner: Assigner) -> None:
        found = confidence.fit(assigner, points, normalise=normalise, algorithm="temi", reject=0.5)[0]
        found.save(layout.out("cluster", "swav"))

    save(Layers([(weight, bias)], unit=unit))
    found = build("clusters")
    compared = F.normalize(features, dim=1) if normalise or unit else features
    expected = compared.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(found.model(images("train")).double(), expected, rtol=1e-4, atol=1e-4)
    assert found.names == ["0", "1", "2", "3"]
    save(Layers([(torch.randn(8, network.feature_dim), torch.zeros(8)), (torch.randn(4, 8), torch.zeros(4))]))
    reason = "the clusters of temi are neither centroids nor a linear head"
    assert build("clusters") == classifiers.Found(None, [], reason)
    save(Layers([(weight[:1], bias[:1])]))
    assert build("clusters").reason == "a single cluster, which no classifier can get wrong"


def test_features_that_all_are_centroids_have_finite_logits() -> None:
    centroids = torch.eye(3)
    logits = classifiers.nearest_centroid(centroids, centroids)(centroids)
    assert torch.equal(logits.argmax(1), torch.arange(3))
    assert torch.isfinite(logits).all()


def test_linear_is_the_linear_stages_classifier_and_fine_tuning_lowers_its_error() -> None:
    weights = load_file(layout.out("linear", "swav") / "classifier.safetensors")
    features = encoders.load(layout.out("pretrain", "swav"))(images("train"))
    linear, labels = build("linear"), torch.from_numpy(np.load(layout.split("train") / "labels.npy"))
    logits = linear.model(images("train"))
    torch.testing.assert_close(logits, features @ weights["weight"].T + weights["bias"])
    assert linear.names == ["a", "b", "c"]
    assert not any(module.training for module in linear.model.modules())
    both = (logits, build("fine_tuned").model(images("train")))
    error, tuned = (float((found.argmax(1) != labels).double().mean()) for found in both)
    assert error > max(0.05, 2 * tuned)


def test_fine_tuning_is_the_same_twice_with_dropout_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropout(encoder: encoders.Encoder) -> None:
        encoder.backbone = torch.nn.Sequential(encoder.backbone, torch.nn.Dropout())

    change(monkeypatch, dropout)
    one, two = (build("fine_tuned").model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_where_there_is_no_classifier_the_reason_is_said_and_missing_outputs_name_the_stage_to_run() -> None:
    assert build("fine_tuned", "pixels") == classifiers.Found(None, [], "the encoder has no parameters to fine-tune")
    shift_workspace.unlabel()
    assert build("fine_tuned").reason == "no labelled training images, so there is no classifier"
    for kind, stage in (("clusters", "cluster"), ("fine_tuned", "linear")):
        for file in layout.out(stage, "swav").iterdir():
            file.unlink()
        with pytest.raises(CheckpointError, match=rf"in artifacts/{stage}/swav.*, found none; run its {stage} stage$"):
            build(kind)
