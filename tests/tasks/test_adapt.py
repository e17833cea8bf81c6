"""The stage `adapt`: its streams, its tables, and what it does where there is nothing to adapt or to measure."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deepclust import encoder as encoders
from deepclust import seeding
from deepclust.adaptation.classifier import Classifier
from deepclust.corruptions import corrupt
from deepclust.errors import CheckpointError
from deepclust.views import to_float
from tasks import adapt, environment, params

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SIZE, CLASSES = 12, 3


def images_and_labels(count=61, channels=1, unlabelled=0):
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, count)
    images = random.integers(0, 90, (count, SIZE, SIZE, channels))
    for index, label in enumerate(labels):
        images[index, :, 4 * label : 4 * label + 4] += 160
    labels[:unlabelled] = -1
    return images.astype(np.uint8), labels


def encoder_of(backbone, channels=1):
    with seeding.seeded("test"):
        encoder = encoders.Encoder(
            backbone=backbone, image_size=SIZE, channels=channels, mean=[0.4] * channels, std=[0.3] * channels
        )
    encoder(to_float(torch.from_numpy(images_and_labels(channels=channels)[0])))  # as if trained: BatchNorm saw data
    return encoder.eval().requires_grad_(False)


def classifier_of(backbone="small"):
    encoder = encoder_of(backbone)
    with seeding.seeded("head"):
        return Classifier(encoder, nn.Linear(encoder.feature_dim, CLASSES))


def options(**changes):
    return params.load(REPOSITORY / "params.yaml").adapt.model_copy(
        update={"corruptions": ("gaussian_noise", "rotation"), "severities": (1, 5), "images": 60, "batch_size": 20}
        | changes
    )


def test_the_choice_is_seeded_and_takes_labelled_images_alone():
    images, labels = images_and_labels(unlabelled=20)
    chosen = adapt.choose(images, labels, count=30, seed=0)
    again, other = adapt.choose(images, labels, count=30, seed=0), adapt.choose(images, labels, count=30, seed=1)
    assert len(chosen.labels) == 30
    assert (chosen.labels >= 0).all()
    assert np.array_equal(chosen.images, again.images)
    assert not np.array_equal(chosen.images, other.images)
    everything = adapt.choose(images, labels, count=1000, seed=0)
    assert sorted(image.tobytes() for image in everything.images) == sorted(image.tobytes() for image in images[20:])
    assert np.array_equal(everything.images[:30], chosen.images), "more images continue the stream"
    of_image = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert all(of_image[image.tobytes()] == label for image, label in zip(chosen.images, chosen.labels, strict=True))


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [4, 5]), (10, 4, [4, 4, 2]), (1, 4, [1]), (3, 1, [1, 1, 1]), (5, 9, [5]), (0, 4, [])],
)
def test_a_last_image_on_its_own_joins_the_batch_before(count, batch_size, sizes):
    cuts = adapt.cuts(count, batch_size)
    assert [cut.stop - cut.start for cut in cuts] == sizes
    assert [index for cut in cuts for index in range(cut.start, cut.stop)] == list(range(count))


def test_a_stream_does_not_depend_on_the_batch_size_and_severities_share_their_noise():
    test = adapt.choose(*images_and_labels(), count=61, seed=3)

    def whole(corruption, severity, batch_size):
        parts = list(adapt.batches(test, corruption, severity, batch_size=batch_size, seed=3))
        assert torch.equal(torch.cat([labels for _, labels in parts]), torch.from_numpy(test.labels))
        return torch.cat([images for images, _ in parts])

    clean = torch.from_numpy(test.images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(whole("clean", 0, 7), clean)
    noisy = whole("gaussian_noise", 5, 7)
    assert torch.equal(noisy, whole("gaussian_noise", 5, 61))
    weak = whole("gaussian_noise", 1, 7)
    inside = (noisy > 0) & (noisy < 1) & (weak > 0) & (weak < 1)
    torch.testing.assert_close((noisy - clean)[inside] / 0.10, (weak - clean)[inside] / 0.04, rtol=0, atol=1e-4)


def test_errors_of_source_are_those_of_the_classifier_on_each_stream():
    model, values = classifier_of(), options(adapters=("source", "bn", "tsd"))
    test = adapt.choose(*images_and_labels(), count=60, seed=0)
    rows, metrics = adapt.run(model, test, values, seed=0, device=CPU)
    for row in rows:
        if row["adapter"] != "source":
            continue
        images = torch.from_numpy(test.images).permute(0, 3, 1, 2).float() / 255
        if row["corruption"] != "clean":
            generator = seeding.generator("adapt", 0, row["corruption"])
            images = corrupt(images, row["corruption"], row["severity"], generator=generator)
        with torch.no_grad():
            wrong = (model(images).argmax(dim=1).numpy() != test.labels).mean()
        assert row["error"] == pytest.approx(wrong)
    streams = [("clean", 0), ("gaussian_noise", 1), ("gaussian_noise", 5), ("rotation", 1), ("rotation", 5)]
    assert [(row["adapter"], row["corruption"], row["severity"]) for row in rows] == [
        (adapter, *stream) for stream in streams for adapter in ("source", "bn", "tsd")
    ]
    assert metrics["clean"] == rows[0]["error"]
    for adapter, error in metrics["errors"].items():
        mean = np.mean([row["error"] for row in rows if row["adapter"] == adapter and row["severity"]])
        assert error == pytest.approx(mean)
    assert metrics["images"] == 60
    assert metrics["not_applicable"] == {}


def test_every_stream_starts_afresh_so_its_result_does_not_depend_on_the_others():
    test = adapt.choose(*images_and_labels(), count=60, seed=0)
    values = options(tsd=options().tsd.model_copy(update={"rate": 0.01}))
    rows, _ = adapt.run(classifier_of(), test, values, seed=0, device=CPU)
    alone, _ = adapt.run(
        classifier_of(), test, values.model_copy(update={"corruptions": ("rotation",)}), seed=0, device=CPU
    )
    assert [row for row in rows if row["corruption"] == "rotation"] == [
        row for row in alone if row["corruption"] == "rotation"
    ]


def test_adapters_that_do_not_apply_are_named_with_the_reason_and_the_others_measured(capsys):
    test = adapt.choose(*images_and_labels(), count=60, seed=0)
    rows, metrics = adapt.run(classifier_of("pixels"), test, options(), seed=0, device=CPU)
    assert {row["adapter"] for row in rows} == {"source"} == set(metrics["errors"])
    assert "BatchNorm" in metrics["not_applicable"]["bn"]
    assert "no parameters" in metrics["not_applicable"]["tsd"]
    assert "bn: not applicable: bn needs BatchNorm" in capsys.readouterr().out


def test_batches_of_one_take_the_adapters_out_that_need_more():
    test = adapt.choose(*images_and_labels(), count=10, seed=0)
    rows, metrics = adapt.run(classifier_of(), test, options(batch_size=1), seed=0, device=CPU)
    assert {row["adapter"] for row in rows} == {"source"}
    assert all("two images a batch" in metrics["not_applicable"][name] for name in ("bn", "tsd"))


def test_source_is_measured_even_where_it_is_not_asked_for():
    test = adapt.choose(*images_and_labels(), count=20, seed=0)
    rows, metrics = adapt.run(classifier_of(), test, options(adapters=("bn",)), seed=0, device=CPU)
    assert list(metrics["errors"]) == ["source", "bn"]
    assert metrics["clean"] == rows[0]["error"]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A workspace with an encoder `swav` and what it needs, and the command that runs the stage there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setattr(sys, "argv", ["adapt", "swav"])
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    images, labels = images_and_labels()
    folder = tmp_path / "artifacts" / "prepare" / "test"
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    for stage in ("pretrain", "linear"):
        (tmp_path / "artifacts" / stage / "swav").mkdir(parents=True)
    model = classifier_of()
    encoders.save(model.featurizer, tmp_path / "artifacts" / "pretrain" / "swav")
    linear = tmp_path / "artifacts" / "linear" / "swav"
    save_file(
        {"weight": model.head.weight.detach(), "bias": model.head.bias.detach()}, linear / "classifier.safetensors"
    )
    (linear / "classifier.json").write_text(json.dumps({"classes": ["a", "b", "c"], "labelled": 61, "reason": None}))
    return tmp_path


def outputs(root):
    files = [
        root / "artifacts/adapt/swav/errors.csv",
        root / "plots/adapt/swav.csv",
        root / "metrics/adapt/swav.json",
    ]
    return [file.read_bytes() for file in files]


def test_the_stage_writes_the_same_bytes_twice(workspace, capsys):
    adapt.main()
    first = outputs(workspace)
    adapt.main()
    assert outputs(workspace) == first
    assert first[0] == first[1]
    rows = list(csv.DictReader(first[0].decode().splitlines()))
    assert list(rows[0]) == ["adapter", "corruption", "severity", "error"]
    assert len(rows) == 3 * (1 + 5 * 3)
    metrics = json.loads(first[2])
    assert set(metrics) == {"clean", "errors", "not_applicable", "images"}
    assert set(metrics["errors"]) == {"source", "bn", "tsd"}
    assert metrics["images"] == 61
    output = capsys.readouterr().out
    assert "adapt.images 2000: there are 61 labelled test images, all are used" in output
    assert "gaussian_noise 3: error source 0." in output


def test_the_stage_says_that_it_had_no_labels(workspace):
    header = b"adapter,corruption,severity,error\n"
    labels = workspace / "artifacts/prepare/test/labels.npy"
    np.save(labels, np.full(61, -1))
    adapt.main()
    assert outputs(workspace)[:2] == [header, header]
    assert json.loads(outputs(workspace)[2]) == {"labelled": 0, "reason": "no labelled test images"}
    linear = workspace / "artifacts/linear/swav"
    (linear / "classifier.safetensors").unlink()
    (linear / "classifier.json").write_text(json.dumps({"classes": [], "labelled": 0, "reason": "no labels"}))
    adapt.main()
    assert outputs(workspace)[:2] == [header, header]
    metrics = json.loads(outputs(workspace)[2])
    assert metrics == {"labelled": 0, "reason": "no labelled training images, so there is no classifier"}


def test_a_single_class_has_nothing_to_measure(workspace):
    linear = workspace / "artifacts/linear/swav"
    save_file({"weight": torch.zeros(1, 128), "bias": torch.zeros(1)}, linear / "classifier.safetensors")
    (linear / "classifier.json").write_text(json.dumps({"classes": ["a"], "labelled": 61, "reason": None}))
    adapt.main()
    assert json.loads(outputs(workspace)[2])["reason"] == "a single class, which no classifier can get wrong"


def test_a_missing_or_damaged_classifier_stops_the_stage_with_one_line_and_no_outputs(workspace, capsys):
    (workspace / "artifacts/linear/swav/classifier.safetensors").write_bytes(b"not weights")
    with pytest.raises(SystemExit) as stop:
        adapt.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the classifier in artifacts/linear/swav is damaged")
    assert message.count("\n") == 1
    assert not (workspace / "artifacts/adapt/swav").exists()
    assert not (workspace / "metrics").exists()
    for name in ("classifier.safetensors", "classifier.json"):
        (workspace / "artifacts/linear/swav" / name).unlink()
        with pytest.raises(CheckpointError, match=r"found none; run its linear stage"):
            adapt.load_head(workspace / "artifacts/linear/swav", 128)


def test_a_classifier_of_other_features_is_an_error(workspace):
    with pytest.raises(CheckpointError, match=r"expected a classifier \(3, 64\).*got \(3, 128\)"):
        adapt.load_head(workspace / "artifacts/linear/swav", 64)
