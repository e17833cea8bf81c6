"""Every stage on small real folders: the files of docs/architecture.md, and claims about what is in them."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn import metrics as metric

from deepclust.clustering import kmeans
from deepclust.clustering.base import Points
from deepclust.models import encoder as encoders
from deepclust.models import features
from tasks.cluster import fitting, scoring
from tasks.pretrain import __main__ as pretrain
from tasks.shared.operations import params
from tasks.shared.operations.observers import probe
from tasks.shared.operations.params import overrides
from tasks.shared.outputs import layout, lineage
from tests.tasks import small_run
from tests.tasks.conftest import ENCODERS

STAGES = ("pretrain", "embed", "cluster", "linear", "adapt")


def metrics(root: Path, stage: str, encoder: str) -> dict:
    return json.loads((root / layout.metrics(stage, encoder)).read_text())


def table(path: Path, **wanted: str) -> list[dict[str, str]]:
    return [row for row in csv.DictReader(path.open()) if wanted.items() <= row.items()]


def embeddings(root: Path, encoder: str, split: str = "test") -> np.ndarray:
    return np.load(root / layout.embeddings(encoder, split)).astype(np.float64)


def _stored(root: Path, encoder: str, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / layout.out("pretrain", encoder) / f"{name}.safetensors")


def test_each_encoder_has_every_output_and_nothing_half_written_stays(labelled: Path) -> None:
    for stage, encoder in itertools.product(STAGES, ENCODERS):
        assert (labelled / layout.out(stage, encoder)).is_dir()
        assert (labelled / layout.metrics(stage, encoder)).is_file()
    assert (labelled / layout.REPORT).is_file()
    assert not list(labelled.rglob("*.partial"))
    random, trained = (_stored(labelled, name, "encoder") for name in ("random", "swav"))
    assert trained.keys() == random.keys()
    assert not torch.equal(trained["backbone.0.weight"], random["backbone.0.weight"])
    rows = table(labelled / layout.curve("pretrain", "swav"))
    assert list(rows[0]) == ["step", "epoch", "loss", "rate"]
    assert int(rows[-1]["step"]) == metrics(labelled, "pretrain", "swav")["steps"] - 1
    assert table(labelled / layout.curve("pretrain", "pixels")) == []


def test_embeddings_are_the_saved_encoders_features_in_data_set_order(labelled: Path) -> None:
    images = np.load(labelled / layout.images(16) / "test.npy")
    for encoder in ENCODERS:
        saved = encoders.load(labelled / layout.out("pretrain", encoder))
        expected = features.extract(saved, images, batch_size=7, device=torch.device("cpu"))
        np.testing.assert_allclose(embeddings(labelled, encoder), expected, atol=2e-5)


def test_assignments_name_the_nearest_centroid_of_every_image(labelled: Path) -> None:
    folder = labelled / layout.out("cluster", "swav")
    centroids = np.load(folder / "centroids.npy")
    found, items = table(folder / "assignments.csv", split="test"), table(labelled / layout.split("test") / "items.csv")
    assert [row["path"] for row in found] == [item["path"] for item in items]
    distances = np.linalg.norm(embeddings(labelled, "swav")[:, None] - centroids[None], axis=2)
    assert [int(row["cluster"]) for row in found] == distances.argmin(1).tolist()
    assert all(0 <= float(row["confidence"]) <= 1 for row in found)
    np.testing.assert_allclose([float(row["distance"]) for row in found], distances.min(1), rtol=1e-4)
    scores = metrics(labelled, "cluster", "swav")
    assert (scores["k"], scores["sizes"]) == (3, np.bincount(distances.argmin(1), minlength=3).tolist())
    assert {k: len(other["sizes"]) for k, other in scores["other_k"].items()} == {"4": 4, "7": 7}


def test_the_stage_cluster_searches_by_faiss_unless_torch_is_asked_for_and_says_where_faiss_is_missing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    found, engines, fit = [], [], kmeans.fit
    monkeypatch.setattr(
        kmeans, "fit", lambda *given, **named: engines.append(named.get("engine")) or fit(*given, **named)
    )
    for engine in ("faiss", "torch", "faiss"):
        overrides.apply(["cluster.k=11", "cluster.algorithms=[kmeans]", f"cluster.kmeans.engine={engine}"])
        small_run.run("cluster", monkeypatch, "swav")
        assert engines[:3] == 3 * [engine], "three seeds"
        missing = "swav: faiss is not installed, nearest centroids by torch" in capsys.readouterr().out
        assert missing == (len(found) == 2)
        found.append(metrics(Path(), "cluster", "swav"))
        engines.clear()
        if engine == "torch":
            monkeypatch.setattr(kmeans, "faiss", None)
    assert found[1] == found[2]
    assert found[0]["nmi"]["mean"] == pytest.approx(found[1]["nmi"]["mean"], rel=1e-5)


def test_the_shown_clustering_is_that_which_agrees_most_with_the_others_on_train(labelled: Path) -> None:
    points = Points(torch.from_numpy(np.load(labelled / layout.embeddings("pcl", "train"))))
    values = params.load(labelled / "params.yaml")
    fits = fitting.fit(
        points, points.features, 3, {"kmeans": values.cluster.algorithm("kmeans")}, seeds=3, seed=values.seed
    )["kmeans"]
    agreements = [
        sum(metric.adjusted_rand_score(one.clusters, other.clusters) for other in fits if other is not one)
        for one in fits
    ]
    assert fitting.typical(fits) == int(np.argmax(np.round(agreements, 9)))
    shown = np.load(labelled / layout.out("cluster", "pcl") / "centroids.npy")
    np.testing.assert_allclose(shown, fits[fitting.typical(fits)].assigner.state()["centroids"].numpy(), atol=1e-6)


def test_the_primary_is_the_algorithm_whose_clusters_neighbours_tell_best(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides.apply(["cluster.primary=auto", "cluster.algorithms=[kmeans, ward, spectral]", "cluster.seeds=1"])
    small_run.run("cluster", monkeypatch, "pixels")
    found = metrics(Path(), "cluster", "pixels")
    told = {name: scores["information"]["mean"] for name, scores in found["algorithms"].items()}
    assert list(told) == ["kmeans", "ward", "spectral"]
    assert told[found["algorithm"]] == max(told.values())
    assert f"pixels: {found['algorithm']} is used" in capsys.readouterr().out
    assert found["acc"] == found["algorithms"][found["algorithm"]]["acc"]


def test_without_labels_the_number_of_clusters_is_estimated_and_its_evidence_kept(unlabelled: Path) -> None:
    found = metrics(unlabelled, "cluster", "pixels")
    tried = table(unlabelled / layout.out("cluster", "pixels") / "how_many.csv")
    best = max(tried, key=lambda row: float(row["score"]))
    assert found["k"] == found["estimate"]["k"] == int(best["k"]) == 3, "three kinds of images"
    assert "acc" not in found


def test_clusters_of_every_level_are_nested_and_unsure_images_have_none(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides.apply(["cluster.k=5", "cluster.other_k=[2, 9]", "cluster.reject=0.25"])
    small_run.run("cluster", monkeypatch, "swav")
    rows = table(Path() / layout.out("cluster", "swav") / "assignments.csv")
    levels = [[int(row[column]) for row in rows] for column in ("cluster_2", "cluster", "cluster_9")]
    for coarse, fine in itertools.pairwise(levels):
        pairs = {(child, parent) for parent, child in zip(coarse, fine, strict=True)}
        assert len({child for child, _ in pairs}) == len(pairs), "each has one parent"
    train = [row for row in rows if row["split"] == "train"]
    assert sum(row["cluster"] == "-1" for row in train) == len(train) // 4
    found = metrics(Path(), "cluster", "swav")
    overrides.apply(["cluster.reject=0.0"])
    small_run.run("cluster", monkeypatch, "swav")
    whole = metrics(Path(), "cluster", "swav")["other_k"]
    assert [found["other_k"][k]["acc"] for k in whole] == [scores["acc"] for scores in whole.values()], "of all images"
    rejected = found["rejected"]
    assert rejected == {
        split: sum(row["cluster"] == "-1" for row in rows if row["split"] == split) for split in rejected
    }


def test_copies_between_train_and_test_are_counted_named_and_warned_of_and_may_be_left_out(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {split: np.load(layout.images(16) / f"{split}.npy") for split in layout.SPLITS}
    images["train"][7], images["test"][2] = images["train"][3], images["train"][3]
    features = {split: np.load(layout.embeddings("pixels", split)) for split in layout.SPLITS}
    features["train"][7], features["test"][2] = features["train"][3], features["train"][3]
    for split in layout.SPLITS:
        np.save(layout.images(16) / f"{split}.npy", images[split])
        np.save(layout.embeddings("pixels", split), features[split])
    monkeypatch.setattr(lineage, "check", lambda *_: None)
    overrides.apply(["cluster.duplicates=first"])
    fitted = []
    monkeypatch.setattr(
        fitting,
        "fit",
        lambda points, *given, fit=fitting.fit, **named: fitted.append(len(points)) or fit(points, *given, **named),
    )
    small_run.run("cluster", monkeypatch, "pixels")
    copies = metrics(Path(), "cluster", "pixels")["inspection"]["copies"]
    assert copies == {
        "train": {"groups": 1, "images": 2},
        "test": {"groups": 0, "images": 0},
        "between": {"groups": 1, "images": 1},
    }
    rows = table(Path() / layout.out("cluster", "pixels") / "duplicates.csv")
    assert [(row["group"], row["split"], row["index"]) for row in rows] == [
        ("0", "train", "3"),
        ("0", "train", "7"),
        ("0", "test", "2"),
    ]
    test = len(images["test"])
    assert f"1 of {test} test images has a copy among the training images (duplicates.csv)" in capsys.readouterr().err
    assert fitted == [len(images["train"]) - 1]


def test_stability_is_the_agreement_of_all_pairs_of_fits_on_the_test_images() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]])
    # The same clusters twice, then one alone and five.
    clusterings = [np.array(each) for each in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1])]
    scorer = scoring.Scorer(points, np.full(6, -1), silhouette_images=6, seed=0)
    # Of 15 pairs 6 and 10 are together, 4 in both: as many as by chance, 6 · 10 / 15.
    agreements = [1.0, 0.0, 0.0]
    assert scorer.mean(clusterings)["stability"] == pytest.approx(
        {"mean": np.mean(agreements), "std": np.std(agreements)}
    )
    assert "stability" not in scorer.mean(clusterings[:2]), "one pair has no deviation"


def test_each_head_clusters_unseen_images_by_their_strongest_score(labelled: Path, unlabelled: Path) -> None:
    head = {name: tensor.double().numpy() for name, tensor in _stored(labelled, "swav", "projection").items()}
    rows = _stored(labelled, "swav", "prototypes")["0"].double().numpy()
    hidden = embeddings(labelled, "swav") @ head["0.weight"].T
    hidden = (hidden - head["1.running_mean"]) / np.sqrt(head["1.running_var"] + 1e-5)
    points = np.maximum(hidden * head["1.weight"] + head["1.bias"], 0) @ head["3.weight"].T + head["3.bias"]
    scores = points @ rows.T / np.linalg.norm(points, axis=1, keepdims=True)
    found = table(labelled / layout.out("cluster", "swav") / "prototypes.csv", split="test")
    np.testing.assert_allclose([float(row["score"]) for row in found], scores.max(1), atol=1e-5)
    assert [int(row["prototype"]) for row in found] == scores.argmax(1).tolist()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    heads = metrics(labelled, "cluster", "deepcluster_v2")["prototypes"]
    assert list(heads) == ["0", "1", "2"]
    assert all(set(head) == {"k", "used", "nmi", "ari", "majority"} for head in heads.values())
    assert set(metrics(unlabelled, "cluster", "swav")["prototypes"]["0"]) == {"k", "used"}
    assert metrics(labelled, "cluster", "pcl")["prototypes"] == {}


def test_the_kept_classifier_gives_the_reported_accuracy(labelled: Path) -> None:
    folder = labelled / layout.out("linear", "pcl")
    weights = {name: tensor.double().numpy() for name, tensor in load_file(folder / "classifier.safetensors").items()}
    predicted = (embeddings(labelled, "pcl") @ weights["weight"].T + weights["bias"]).argmax(1)
    labels = np.load(labelled / layout.split("test") / "labels.npy")
    assert metrics(labelled, "linear", "pcl")["linear"] == pytest.approx((predicted == labels).mean(), abs=1e-6)
    assert metrics(labelled, "cluster", "pixels")["acc"]["mean"] == 1.0, "pixels tell the kinds apart"
    assert metrics(labelled, "linear", "pixels")["knn"] == metrics(labelled, "linear", "pixels")["linear"] == 1.0


def test_a_second_run_of_every_stage_writes_the_same_bytes_and_so_the_same_dvc_lock(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outputs() -> dict[str, bytes]:
        tops = (layout.ARTIFACTS, layout.METRICS, layout.PLOTS)
        files = (path for top in tops for path in top.rglob("*") if path.is_file() and path != layout.COSTS)
        return {str(path): path.read_bytes() for path in files}

    before = outputs()
    small_run.run("prepare", monkeypatch)
    for stage in STAGES:
        small_run.run(stage, monkeypatch, "swav")
    small_run.run("report", monkeypatch)
    after = outputs()
    assert sorted(after) == sorted(before)
    assert [path for path in after if after[path] != before[path]] == []


def test_other_labels_and_so_another_probe_give_the_same_encoder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights() -> dict[str, bytes]:
        files = layout.out("pretrain", "swav").iterdir()
        return {path.name: path.read_bytes() for path in files if path.name not in ("history.csv", lineage.FILE)}

    before = weights()
    labels = np.load(path := layout.split("train") / "labels.npy")
    np.save(path, np.where(labels < 0, labels, labels.max() - labels))
    small_run.run("pretrain", monkeypatch, "swav")
    assert weights() == before


def test_without_labels_label_based_numbers_are_absent_and_the_rest_is_there(unlabelled: Path) -> None:
    for encoder in ("pixels", "swav"):
        clusters, adapted = (metrics(unlabelled, stage, encoder) for stage in ("cluster", "adapt"))
        assert clusters["k"] == clusters["estimate"]["k"]
        assert not {"acc", "nmi", "ari"} & clusters.keys()
        assert {"silhouette", "sizes", "estimate"} <= clusters.keys()
        assert metrics(unlabelled, "linear", encoder) == {"labelled": 0, "reason": "no labelled training images"}
        assert (adapted["labelled"], adapted["reason"]) == (0, "no labelled test images")
        assert next(iter(adapted["not_applicable"])) == "linear"
        assert (unlabelled / layout.out("cluster", encoder) / "gallery.png").is_file()
        assert not (unlabelled / layout.out("linear", encoder) / "classifier.safetensors").exists()


def test_the_probe_measures_knn_and_leaves_the_encoder_as_it_was(here: Path) -> None:
    run = Mock()
    trained = encoders.load(layout.out("pretrain", "swav")).train()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    state = torch.random.get_rng_state()
    done = pretrain.loop.Epoch(epoch=0, seconds=2.0, waiting_seconds=0.5, images=64)
    probe.Probe(run, "swav", trained, torch.device("cpu"))(done, {"loss": 1.0})
    logged = {name: value for call in run.log_metrics.call_args_list for name, value in call.args[0].items()}
    assert 0.5 < logged["knn_heldout"] <= 1
    assert (logged["images_per_second"], logged["data_share"]) == (32, 0.25)
    assert trained.training
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_users_mistake_is_one_line_and_leaves_the_old_outputs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage, encoder, edit, message in (
        ("cluster", "swav", "cluster.k=90", "cluster.k: expected at most"),
        ("pretrain", "pcl", "pretrain.pcl.clusters=[24, 900]", "clusters: expected at most"),
        ("embed", "nonsense", "seed=1", "expected an encoder of params.yaml"),
    ):
        overrides.apply([edit])
        with pytest.raises(SystemExit, match="2"):
            small_run.run(stage, monkeypatch, encoder)
        assert re.match(f"error: .*{message}", capsys.readouterr().err.strip().splitlines()[-1])
        assert not list(layout.ARTIFACTS.rglob("*.partial"))
        assert any(layout.out(stage, "swav").iterdir())
