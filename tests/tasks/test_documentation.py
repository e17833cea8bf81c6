"""Every option of a method is on its page, and no page speaks of one that is gone."""

from __future__ import annotations

import re

import pytest

from tasks import pretrain_sections as sections
from tasks.closure import ROOT

PAGES = ROOT / "docs" / "methods"
METHODS = {
    "swav": sections.SwAV,
    "deepcluster_v2": sections.DeepClusterV2,
    "moco": sections.MoCo,
    "pcl": sections.PCL,
    "simsiam": sections.SimSiam,
}


def _first_columns(page: str) -> set[str]:
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([a-z0-9_.]+)`", row)}


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_page_has_exactly_its_options(method: str) -> None:
    assert _first_columns(method) == set(METHODS[method].model_fields) - {"method"}


def test_every_file_that_a_page_links_to_is_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_what_methods_share_is_on_the_page_of_training() -> None:
    common = set(sections.Trained.model_fields) - {"hidden_dim", "dim", "optimiser"}
    of_optimisers = {
        f"optimiser.{name}" for kind in (sections.SGD, sections.LARS, sections.AdamW) for name in kind.model_fields
    } - {"optimiser.betas"}
    pretrained = set(sections.Pretrained.model_fields) - {"method"}
    assert common | of_optimisers | pretrained <= _first_columns("training")
