"""Every mistake in params.yaml is one line with the path as written, what came, and the nearest valid name."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepclust.errors import ConfigError
from tasks.shared.operations import params
from tasks.shared.operations.params import overrides
from tests.paths import ROOT


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return params.read(ROOT / "params.yaml")


def _with(raw: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    here: Any = raw
    *parents, last = dotted.split(".")
    for part in parents:
        here = here[int(part) if part.isdigit() else part]
    here[last] = value
    return raw


def test_the_repositorys_parameters_are_valid_and_frozen(whole: dict[str, Any]) -> None:
    values = params.parse(whole)
    assert values.method("swav") is values.pretrain.encoders["swav"]
    with pytest.raises(ValueError, match="frozen"):
        values.seed = 1


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("sead", 1, r"^sead: unknown parameter; did you mean seed\?$"),
        ("data.image_sise", 8, r"^data\.image_sise: unknown parameter; did you mean image_size\?$"),
        ("pretrain.swav.prototype", 8, r"^pretrain\.swav\.prototype: unknown parameter; did you mean prototypes\?$"),
        (
            "pretrain.pcl.optimiser.rates",
            1,
            r"^pretrain\.pcl\.optimiser\.rates: unknown parameter; did you mean rate\?$",
        ),
        ("pretrain.swav.crops.0.sice", 1, r"^pretrain\.swav\.crops\.0\.sice: unknown parameter; did you mean size\?$"),
        ("adapt.tsd.filter", 1, r"^adapt\.tsd\.filter: unknown parameter; did you mean filter_k\?$"),
        (
            "pretrain.swav.method",
            "swaw",
            r"^params\.yaml: pretrain\.swav\.method: expected 'swav', .*got 'swaw'",
        ),
        ("seed", "zero", r"^seed: .*integer.*, got 'zero'$"),
        ("seed", -1, r"^seed: .*greater than or equal to 0, got -1$"),
        ("data.max_skipped", 1.5, r"^data\.max_skipped: .*less than or equal to 1, got 1\.5$"),
        ("data.source", "FashionMIST", r"^data\.source: .*'FashionMNIST'.*, got 'FashionMIST'$"),
        ("linear.neighbours", [], r"^linear\.neighbours: .*at least 1 item.*$"),
        ("pretrain.swav.temperature", float("nan"), r"^pretrain\.swav\.temperature: .*finite.*$"),
        ("adapt.severities", [6], r"^adapt\.severities\.0: .*less than or equal to 5, got 6"),
        ("adapt.severities", [5, 3, 5], r"^adapt: severities must be distinct, got \[5, 3, 5\]$"),
        ("adapt.corruptions", ["fog", "fog"], r"^adapt: corruptions must be distinct, got \['fog', 'fog'\]$"),
        ("adapt.corruptions", ["fogg"], r"^adapt\.corruptions\.0: .*'fog'.*, got 'fogg'$"),
        ("adapt.batch_sizes", [64, 64], r"^adapt: batch_sizes must be distinct"),
        ("adapt.settings", ["reset", "reset"], r"^adapt: settings must be distinct"),
        ("adapt.classifiers", ["linear", "linear"], r"^adapt: classifiers must be distinct"),
        ("adapt.adapters", ["bn", "bn"], r"^adapt: adapters must be distinct"),
        ("adapt.adapters", ["tend"], r"^adapt\.adapters\.0: .*'tent'.*, got 'tend'$"),
        ("adapt.fine_tune.batch_size", 1, r"^adapt\.fine_tune\.batch_size: .*greater than or equal to 2, got 1$"),
        ("encoders", {"pixels": "pixels", "swaf": "swaf"}, r"^encoders\.swaf: expected 'pixels', .*, got 'swaf'$"),
        ("encoders", {"wide": "swav"}, r"^params\.yaml: encoders names 'wide', but there is no section pretrain\.wide"),
        (
            "encoders",
            ["pixels"],
            r"^params\.yaml: encoders: expected \{name: method, …\}, got a list; run",
        ),
        ("pretrain.swav.assign_crops", [0, 4], r"^pretrain\.swav: assign_crops must be distinct crop numbers below 4"),
        ("pretrain.swav.crops.0.scale", [0.9, 0.5], r"^pretrain\.swav\.crops\.0: scale must be \[low, high\]"),
        ("pretrain.swav.crops.0.size", 14.5, r"^pretrain\.swav\.crops\.0: size must be whole pixels"),
        ("pretrain.simsiam.crops.0.count", 3, r"^pretrain\.simsiam: needs exactly two crops of each image, got 3$"),
        ("pretrain.pcl.crops.0.count", 1, r"^pretrain\.pcl: needs exactly two crops"),
        ("pretrain.pcl.queue_length", 4000, r"^pretrain\.pcl: queue_length 4000 .*the nearest is 4032$"),
        (
            "pretrain.swav.optimiser.momentun",
            0.9,
            r"^pretrain\.swav\.optimiser\.momentun: unknown parameter; did you mean momentum\?$",
        ),
        (
            "pretrain.swav.optimiser.name",
            "adam",
            r"^pretrain\.swav\.optimiser\.name: one of sgd, lars, larc, adamw is expected, got 'adam'$",
        ),
        ("pretrain.swav.optimiser.name", "lars", r"^pretrain\.swav\.optimiser\.trust: missing"),
        ("pretrain.swav.prototypes", 1, r"^pretrain\.swav\.prototypes: .*greater than or equal to 2.*, got 1$"),
        (
            "pretrain.swav.prototypes",
            [30, 1],
            r"^pretrain\.swav\.prototypes\.1: .*greater than or equal to 2.*, got 1$",
        ),
        ("pretrain.swav.queue_length", 300, r"^pretrain\.swav: queue_length 300 .*the nearest is 256$"),
        ("pretrain.swav.accumulate", 3, r"^pretrain\.swav: accumulate 3 must divide batch_size 256"),
        ("pretrain.moco.key_groups", 129, r"^pretrain\.moco: key_groups 129 .*at most 128"),
        ("pretrain.pcl.kmeans_restarts", 0, r"^pretrain\.pcl\.kmeans_restarts: .*greater than or equal to 1, got 0$"),
        (
            "pretrain.pcl.clusters",
            [64, 900],
            r"^pretrain\.pcl: negatives must be at least 1, .* got 0; raise clusters",
        ),
        ("pretrain.pcl.clusters", [600, 600], r"^pretrain\.pcl: clusters must be distinct"),
        (
            "pretrain.swav.optimiser.warmup_epochs",
            6,
            r"^pretrain\.swav: optimiser\.warmup_epochs 6 must be below epochs 6",
        ),
        ("pretrain.shared.stem", "imagenet", r"^pretrain\.shared: stem 'imagenet' is a ResNet's"),
        ("pretrain.shared.backbone", "resnet19", r"^pretrain\.shared\.backbone: .*pattern.*, got 'resnet19'|^pretrain"),
        (
            "pretrain.pretrained.weights",
            "timm",
            r"^pretrain\.pretrained: weights: timm needs a backbone timm/NAME\.TAG",
        ),
        ("pretrain.watchdog", "bark", r"^pretrain\.watchdog: expected 'warn' or 'stop', got 'bark'$"),
    ],
)
def test_a_mistake_is_one_line(whole: dict[str, Any], dotted: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        params.parse(_with(whole, dotted, value))
    assert "\n" not in str(caught.value)


def test_a_missing_parameter_is_an_error_as_there_are_no_defaults(whole: dict[str, Any]) -> None:
    raw = copy.deepcopy(whole)
    del raw["cluster"]["seeds"]
    with pytest.raises(ConfigError, match=r"^cluster\.seeds: missing; every parameter is stated in params\.yaml$"):
        params.parse(raw)


def test_the_negatives_of_pcl_may_just_fit(whole: dict[str, Any]) -> None:
    raw = _with(_with(whole, "pretrain.pcl.clusters", [500, 1000]), "pretrain.pcl.negatives", 500 - 64)
    params.parse(raw)
    with pytest.raises(ConfigError, match=r"^pretrain\.pcl: negatives must be .* 500, .* got 437"):
        params.parse(_with(raw, "pretrain.pcl.negatives", 500 - 63))


def test_an_unknown_encoder_is_named_with_the_nearest(whole: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"got 'swaw'; did you mean swav\?$"):
        params.parse(whole).method("swaw")


def test_numbers_read_as_they_are_meant(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: 1e-4\nb: 5.0e-4\nc: 50_000_000\nd: 1.5E3\n")
    assert params.read(tmp_path / "params.yaml") == {"a": 1e-4, "b": 5e-4, "c": 50_000_000, "d": 1500.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is not valid YAML"), ("- 1", "expected sections in .*, got list"), (None, "found none; run from")],
)
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        params.read(path)
    assert "\n" not in str(caught.value)


def test_the_check_is_a_command(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    done = subprocess.run([sys.executable, "-m", "tasks.params", "check"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: encoders: missing; ")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("pretrain.swav.epochs", True),
        ("pretrain.swav.epochs", "3"),
        ("cluster.normalise", 1),
        ("pretrain.simsiam.constant_predictor_rate", "yes"),
        ("pretrain.simsiam.hidden_dim", 0),
        ("pretrain.shared.backbone", "pixels"),
        ("pretrain.pcl.warmup_epochs", 4),
        ("data.image_size", "big"),
        ("cluster.other_k", [1]),
    ],
)
def test_values_that_only_look_right_are_refused(path: str, value: object) -> None:
    raw = params.read(ROOT / "params.yaml")
    section = raw
    *folders, last = path.split(".")
    for name in folders:
        section = section[name]
    section[last] = value
    with pytest.raises(ConfigError, match=path.rpartition(".")[0].replace(".", r"\.")) as refused:
        params.parse(raw)
    assert "\n" not in str(refused.value)
    assert "constrained" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('seed: !!python/object/apply:os.mkdir ["made"]', "not valid YAML"),
        ("seed: 0\nseed: 1", "'seed' is stated twice"),
    ],
)
def test_a_file_that_runs_code_or_says_a_thing_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace("seed: 0", line, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=complaint):
        params.load(tmp_path / "params.yaml")
    with pytest.raises(ConfigError):
        overrides.apply(["embed.batch_size=100"], tmp_path / "params.yaml")
    assert not (tmp_path / "made").exists()
