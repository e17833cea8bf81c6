"""Every mistake in params.yaml is one line with the path as written, what came, and the nearest valid name."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import parse_yaml

from deepclust.errors import ConfigError
from tasks.shared.operations import params
from tasks.shared.operations.params import command, overrides
from tests.paths import ROOT


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return params.read(ROOT / "params.yaml")


_GONE = object()


def _with(raw: dict[str, Any], dotted: str | int, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    here: Any = raw
    *parents, last = dotted.split(".") if isinstance(dotted, str) else (dotted,)
    for part in parents:
        here = here[int(part) if part.isdigit() else part]
    here[last] = here[last] | value if isinstance(value, dict) and last in ("tsd", "lame") else value
    if value is _GONE:
        del here[last]
    return raw


def test_the_repositorys_parameters_are_valid_and_frozen(whole: dict[str, Any]) -> None:
    values = params.parse(whole)
    assert values.options("swav") == values.options("swav")
    with pytest.raises(dataclasses.FrozenInstanceError):
        values.seed = 1


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        (
            "cluster.seeds",
            _GONE,
            r"^cluster\.seeds: missing; every parameter is stated in .*migrate.*\)$",
        ),
        ("pretrain.swav.crops.0.ratio", _GONE, r"^pretrain\.swav\.crops\.0\.ratio: missing; every parameter is stated"),
        (1, 2, r"^1: unknown parameter$"),
        ("pretrain.wide", {"method": ["swav"]}, r"^pretrain\.wide: expected a method .*, got \['swav'\]"),
        (
            "pretrain.swav.method",
            "pcl",
            r"^pretrain\.swav\.method: expected 'swav', as encoders says, got 'pcl'; leave",
        ),
        ("sead", 1, r"^sead: unknown parameter; did you mean seed\?$"),
        ("seed", "zero", r"^seed: .*integer.*, got 'zero'$"),
        ("data.source", "FashionMIST", r"^data\.source: .*'FashionMNIST'.*, got 'FashionMIST'$"),
        ("cluster.normalise", 1, r"^cluster\.normalise: expected a valid boolean, got 1$"),
        ("adapt.tsd", {"compat": "original", "steps": 2}, r"^adapt\.tsd: compat 'original' means steps 1, got 2; "),
        (
            "adapt.tsd",
            {"local_weight": 0.0, "parameters": "head"},
            r"^adapt\.tsd: .* no gradient reaches parameters head",
        ),
        ("adapt.lame", {"affinity": "linear", "neighbours": 5}, r"^adapt\.lame: affinity 'linear' has no neighbours"),
        ("adapt.tdd", {}, r"^adapt\.tdd: unknown parameter; did you mean tsd\?$"),
        ("adapt.settings", ["rest"], r"^adapt\.settings\.0: expected one of .*; got 'rest'; did you mean reset\?$"),
        (
            "adapt.encoders",
            ["swaf"],
            r"^adapt\.encoders\.0: expected one of .*; got 'swaf'; did you mean swav\?$",
        ),
        ("adapt.severities", [5, 3, 5], r"^adapt: severities must be distinct, got \[5, 3, 5\]$"),
        ("adapt.fine_tune.batch_size", 1, r"^adapt\.fine_tune\.batch_size: .*greater than or equal to 2, got 1$"),
        ("encoders", {"wide": "swav"}, r"^encoders names 'wide', but there is no section pretrain\.wide"),
        ("encoders", {"swav": "swaf"}, r"^encoders\.swav: expected a method .*, got 'swaf'; did you mean swav\?$"),
        ("pretrain.shared.stem", "imagenet", r"^pretrain\.shared: stem 'imagenet' is a ResNet's"),
        ("pretrain.shared.optimiser.name", "lars", r"^pretrain\.shared\.optimiser\.trust: missing"),
        ("pretrain.pretrained.weights", "timm", r"^pretrain\.pretrained: weights: timm needs a backbone timm/NAME"),
        ("pretrain.swav.prototype", 8, r"^pretrain\.swav\.prototype: unknown parameter; did you mean prototypes\?$"),
        ("pretrain.swav.crops.0.sice", 1, r"^pretrain\.swav\.crops\.0\.sice: unknown parameter; did you mean size\?$"),
        ("pretrain.swav.temperature", float("nan"), r"^pretrain\.swav\.temperature: .*finite.*$"),
        ("pretrain.swav.epochs", True, r"^pretrain\.swav\.epochs: expected a valid integer, got True$"),
        ("pretrain.swav.epochs", "3", r"^pretrain\.swav\.epochs: expected a valid integer, got '3'$"),
        ("pretrain.swav.assign_crops", [0, 4], r"^pretrain\.swav: assign_crops must be distinct crop numbers below 4"),
        ("pretrain.swav.crops.0.size", 14.5, r"^pretrain\.swav\.crops\.0: size must be whole pixels"),
        ("pretrain.swav.optimiser.warmup_epochs", 6, r"^pretrain\.swav: optimiser\.warmup_epochs 6 must be below"),
        ("pretrain.swav.queue_length", 300, r"^pretrain\.swav: queue_length 300 .*the nearest is 256$"),
        ("pretrain.swav.accumulate", 3, r"^pretrain\.swav: accumulate 3 must divide batch_size 256"),
        ("pretrain.simsiam.crops", [{"count": 3, "size": 1.0, "scale": [0.2, 1], "ratio": [1, 1]}], "exactly two"),
        ("pretrain.moco.key_groups", 129, r"^pretrain\.moco: key_groups 129 .*at most 128"),
        ("pretrain.pcl.clusters", [64, 900], r"^pretrain\.pcl: negatives must be at least 1, .* got 0; raise clusters"),
        ("pretrain.pcl.clusters", [600, 600], r"^pretrain\.pcl: clusters must be distinct"),
        ("pretrain.pcl.warmup_epochs", 4, r"^pretrain\.pcl: warmup_epochs 4 must be below epochs 3"),
    ],
)
def test_a_mistake_is_one_line(whole: dict[str, Any], dotted: str | int, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        params.parse(_with(whole, dotted, value))
    assert "\n" not in str(caught.value)
    assert "constrained" not in str(caught.value)


def test_a_section_may_state_its_method_whether_its_encoder_runs_or_not(whole: dict[str, Any]) -> None:
    wide = whole["pretrain"]["swav"] | {"method": "swav"}
    values = params.parse(_with(_with(whole, "pretrain.wide", wide), "pretrain.swav.method", "swav"))
    assert (values.method("wide"), values.options("wide")) == ("swav", values.options("swav"))


def test_a_value_is_what_dvc_reads(tmp_path: Path) -> None:
    text = "a: 1e-4\nb: 5.0e-4\nc: 50_000_000\nd: 010\ne: 1:30\nf: 0x1F\ng: yes\nh: null\ni: 1.5E3\n"
    (tmp_path / "params.yaml").write_text(text)
    found = params.read(tmp_path / "params.yaml")
    assert found == parse_yaml(text, "params.yaml")
    assert (found["a"], found["c"], found["d"], found["e"], found["g"]) == (1e-4, 50_000_000, 10, "1:30", "yes")


@pytest.mark.parametrize(
    ("text", "came"), [("2024-01-05", "2024-01-05"), ("1e5", "100000.0"), ("0x10", "16"), ("true", "True")]
)
def test_a_text_that_yaml_reads_as_something_else_is_to_be_put_into_quotes(
    tmp_path: Path, text: str, came: str
) -> None:
    content = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(content.replace("\n  folder: data ", f"\n  folder: {text} "))
    with pytest.raises(ConfigError, match=rf"^data\.folder: expected a valid string, got {came}; put it into quotes$"):
        params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "expected sections in .*, got list"),
        (None, "found none; run from"),
        ('seed: !!python/object/apply:os.mkdir ["made"]', "not valid YAML"),
        ("seed: 0\nseed: 1", 'duplicate key "seed"'),
    ],
)
def test_a_file_that_is_no_plain_mapping_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        params.read(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        overrides.apply(["embed.batch_size=100"], path)
    assert not (tmp_path / "made").exists()


def test_check_and_show_are_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["params", *words])
        command.main()
        return capsys.readouterr().out

    monkeypatch.chdir(ROOT)
    shown = run("show", "moco")
    assert "    key_momentum: 0.99  # Momentum m of the momentum encoder.\n" in shown
    assert "      weight_decay: 0.0005  # Weight decay; " in shown, "what it takes over from pretrain.shared"
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    overrides.apply(["data.folder=a # b"])
    values = params.load().resolved()
    (tmp_path / "params.yaml").write_text(run("show"))
    assert params.load().resolved() == values
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    with pytest.raises(SystemExit, match="2"):
        run("check")
    assert capsys.readouterr().err.startswith("error: encoders: missing")
