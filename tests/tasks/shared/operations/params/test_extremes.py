"""Values and files out of all proportion are one line and status 2, at once."""

from __future__ import annotations

import copy
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deepclust.errors import ConfigError, StageError
from tasks.shared.operations import params
from tasks.shared.operations.params import command, overrides
from tasks.shared.operations.processes import dvc_runner
from tests.paths import ROOT

HUGE = 10**30
VALUES: dict[str, list[Any]] = {
    "seed": [HUGE, -1, -HUGE, 2**63, 10**99, 0.5, float("nan"), float("inf"), True, None, "", [[0]]],
    "data.folder": [
        *("", " ", "\t", ".", "./", "a/..", "~", "~nouser", "~nouser/images", "a\0b", None),
        *("data.dvc", "sub/data.dvc/", "s3://bucket", "https:/x"),  # which DVC takes for something else
    ],
    "pretrain.shared.image_size": [10**9, 0, -8, HUGE],
    "data.white": [float("inf"), float("nan"), -1, 0, 10**400],
    "data.pages": [HUGE, -1],
    "data.bands": [[HUGE], [-1], [0.5], [0, 1]],
    "data.test_fraction": [0.0, 1.0, float("nan"), -0.1],
    "data.max_pixels": [0, HUGE],
    "adapt.domains": ["", "~nouser", "\0"],
    "adapt.batch_sizes": [[], [0], [10**12]],
    "adapt.images": [10**12, 0, "most"],
    "adapt.encoders": [[HUGE], ["a.b"], "all"],
    "adapt.budget": [0, -1, float("inf"), float("nan"), "auto"],
    "adapt.shared.rate": [float("inf"), -1.0, 10**400],
    "embed.batch_size": [10**12, 0],
    "cluster.k": [1, HUGE, float("inf")],
    "cluster.seeds": [0, 10**20],
    "cluster.other_k": [[HUGE]],
    "linear.temperatures": [[float("nan")], [0.0], [float("inf")]],
    "pretrain.checkpoint.every_seconds": [float("inf"), float("nan")],
    "pretrain.shared.batch_size": [10**12],
    "pretrain.shared.optimiser.rate": [float("nan"), float("inf")],
    "pretrain.swav.epochs": [10**20, 0],
    "pretrain.swav.dim": [10**9, HUGE],
    "pretrain.swav.hidden_dim": [10**9],
    "pretrain.simsiam.dim": [10**9],
    "pretrain.swav.prototypes": [HUGE],
    "pretrain.swav.crops.0.count": [10**9],
    "pretrain.swav.temperature": [float("inf"), float("-inf")],
}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return params.read(ROOT / "params.yaml")


@pytest.mark.parametrize("dotted", VALUES)
def test_an_extreme_value_is_one_line_with_its_path(whole: dict[str, Any], dotted: str) -> None:
    for value in VALUES[dotted]:
        raw = copy.deepcopy(whole)
        here: Any = raw
        *parents, last = dotted.split(".")
        for part in parents:
            here = here[int(part) if part.isdigit() else part]
        here[last] = value
        with pytest.raises(ConfigError, match=rf"^{re.escape(dotted)}[^\n]*$") as caught:
            params.parse(raw)
        assert len(str(caught.value)) < 600, value


_ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
FILES = {
    "1,000 levels": "seed: " + "[" * 1000 + "]" * 1000,
    "100,000 levels": "seed: " + "[" * 100_000,
    "1,000 mappings": "seed: " + "{a: " * 1000 + "1" + "}" * 1000,
    "aliases of aliases": _ALIASES,
    "an alias of itself": "seed: &a [*a]",
    "a number of 5,000 digits": "seed: " + "9" * 5000,
    "and in hexadecimal": "seed: 0x" + "F" * 5000,
    "no date": "seed: 2024-13-45",
    "no number": "seed: !!int abc",
    "no truth value": "seed: !!bool maybe",
    "a tag": "seed: !something 1",
    "two documents": "seed: 1\n---\nseed: 2",
    "a key twice": "seed: 1\nseed: 2",
    "a list": "- 1",
    "nothing": "",
    "no UTF-8": b"seed: \xff",
    "a zero byte": b"seed: \0",
    "a megabyte": "#" * (1 << 20) + "\nseed: 0",
}


def _ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says before it ends with status 2; it is one line, and soon."""
    monkeypatch.setattr(sys, "argv", ["tasks.params", *words])
    begin = time.process_time()
    with pytest.raises(SystemExit, match=r"^2$"):
        command.main()
    assert time.process_time() - begin < 10
    said = capsys.readouterr().err
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("kind", FILES)
def test_a_file_out_of_all_proportion_is_one_line_and_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = FILES[kind]
    Path("params.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "params.yaml" in _ends(monkeypatch, capsys, "check")


def test_what_is_no_file_is_one_line_and_nobody_waits_for_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "found none; run from the repository's root" in _ends(monkeypatch, capsys, "check")
    Path("params.yaml").symlink_to("nowhere")
    assert "found none" in _ends(monkeypatch, capsys, "check")
    Path("params.yaml").unlink()
    Path("params.yaml").mkdir()
    assert "which is no file" in _ends(monkeypatch, capsys, "check")
    os.mkfifo("pipe")
    Path("pipe.yaml").symlink_to("pipe")
    for path in ("pipe", "pipe.yaml"):
        assert "which is no file" in _ends(monkeypatch, capsys, "migrate", path)


def test_an_override_out_of_all_proportion_is_one_line_too(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(before := (ROOT / "params.yaml").read_bytes())
    for edit in ("seed=" + "[" * 1000, "seed=0x" + "F" * 5000, "seed=!!int x"):
        with pytest.raises(ConfigError, match=r"^seed: [^\n]*$"):
            overrides.apply([edit], file)
    assert file.read_bytes() == before


def test_an_edit_goes_through_a_link_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "params.yaml").symlink_to("real.yaml")
    overrides.apply(["seed=5"], tmp_path / "params.yaml")
    assert (tmp_path / "params.yaml").is_symlink()
    assert params.read(tmp_path / "real.yaml")["seed"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml", "real.yaml"]


@pytest.mark.parametrize("text", ["", "a: 1", "stages:", "stages: [1]", "stages: {prepare: 1}", "stages: x", "- 1"])
def test_a_graph_that_can_not_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("domains").mkdir()
    Path("dvc.yaml").write_text(text)
    with pytest.raises((StageError, ConfigError), match=r"^expected [^\n]* dvc\.yaml[^\n]*$"):
        dvc_runner.check(params.parse(whole, whole=False))
