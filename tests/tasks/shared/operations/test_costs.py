"""Clock readings: shown beside the outputs that they are of, and nowhere in them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tasks.shared.operations import costs
from tasks.shared.outputs import layout, stage
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    monkeypatch.setattr(sys, "argv", ["tasks.embed", "pixels"])


def _embed(content: str, **measured: float) -> None:
    with stage.running("embed") as running:
        (running.folder / "features").write_text(content)
        running.cost(**measured)


def test_a_reading_is_of_the_outputs_that_are_there_and_of_no_others() -> None:
    assert costs.reading("embed", "pixels") is None
    _embed("old", images=70, embedding_seconds=3.5)
    found = costs.reading("embed", "pixels")
    assert found is not None
    assert (found["images"], found["embedding_seconds"]) == (70, 3.5)
    assert found["threads"] >= 1
    assert found["processor"]
    old = layout.cost("embed", "pixels").read_text()
    _embed("new")
    assert "images" not in (costs.reading("embed", "pixels") or {})
    layout.cost("embed", "pixels").write_text(old)
    assert costs.reading("embed", "pixels") is None, "of the old outputs"


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"seconds": "x"}', "seconds 1e999", "seconds -1", "folder"])
def test_a_reading_that_is_damaged_is_not_known(damage: str) -> None:
    _embed("old")
    path = layout.cost("embed", "pixels")
    if damage.startswith("seconds"):
        value = json.loads(path.read_text())
        damage = json.dumps(value | {"seconds": None}).replace("null", damage.split()[1])
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_text(damage)
    assert costs.reading("embed", "pixels") is None


def test_outputs_are_kept_where_their_cost_can_not_be_written() -> None:
    layout.cost("embed", "pixels").parent.parent.mkdir(parents=True)
    layout.cost("embed", "pixels").parent.touch()
    _embed("new")
    assert (layout.out("embed", "pixels") / "features").read_text() == "new"


def test_the_parts_of_an_interrupted_run_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"monotonic": 100.0, "process_time": 7.0}
    for name in now:
        monkeypatch.setattr(costs.time, name, lambda name=name: now[name])
    first = costs.Clock()
    now |= {"monotonic": 160.0, "process_time": 57.0}
    saved = first.state_dict()
    assert saved == {"seconds": 60.0, "processor_seconds": 50.0}
    now |= {"monotonic": 1000.0, "process_time": 2.0}  # another process, later
    second = costs.Clock()
    now |= {"monotonic": 1005.0, "process_time": 3.0}
    second.load_state_dict(saved)
    now |= {"monotonic": 1030.0, "process_time": 22.0}
    assert second.state_dict() == {"seconds": 90.0, "processor_seconds": 70.0}
