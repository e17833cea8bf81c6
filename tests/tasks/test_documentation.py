"""Every option of a method is on its page, no page speaks of one that is gone, and its code runs."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import nn

from deepclust import seeding
from deepclust.images import formats
from deepclust.methods import METHODS, config_class
from deepclust.methods.parts.options import TrainedConfig
from deepclust.training.optim import LARS, SGD, AdamW
from tests.paths import ROOT

PAGES = ROOT / "docs" / "methods"


def _options(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _first_columns(page: str) -> set[str]:
    rows = re.findall(r"^\| (`.*?) \|", (PAGES / f"{page}.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([a-z0-9_.]+)`", row)}


@pytest.mark.parametrize("method", [name for name in METHODS if issubclass(config_class(name), TrainedConfig)])
def test_a_methods_page_has_exactly_its_options(method: str) -> None:
    assert _first_columns(method) == _options(config_class(method))


def test_every_file_that_a_page_links_to_is_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_what_methods_share_is_on_the_page_of_training() -> None:
    common = _options(TrainedConfig) - {"hidden_dim", "dim", "optimiser"}
    of_optimisers = {f"optimiser.{name}" for kind in (SGD, LARS, AdamW) for name in _options(kind)}
    pretrained = _options(config_class("pretrained"))
    assert common | of_optimisers - {"optimiser.betas"} | pretrained <= _first_columns("training")


@pytest.mark.parametrize("page", ["README.md", "docs/methods/adaptation.md"])
def test_code_that_adapts_a_classifier_runs_as_it_stands(page: str) -> None:
    """Python blocks that import from deepclust.adaptation and nowhere else: `model` and `images` are all they need."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    imports = r"^(?:from|import) (\S+)"
    ours = [each for each in blocks if {*re.findall(imports, each, re.MULTILINE)} == {"deepclust.adaptation"}]
    assert ours
    for block in ours:
        with seeding.seeded("test"):
            model = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
            )
        images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model(images)  # BatchNorm has seen data
        names: dict[str, Any] = {"model": model.eval(), "images": images}
        exec(block, names)
        assert names["logits"].shape == (16, 5)
        assert torch.isfinite(names["logits"]).all()


def test_the_page_of_data_names_every_format_that_is_read_with_its_suffixes() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| [^|]+ \| `(\.[^`|]+)`", page, re.MULTILINE))
    assert rows == {format_.suffixes for format_ in formats.ALL if format_.needs}
