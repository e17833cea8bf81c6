"""Clock readings beside the report: known by the outputs that they are of, and text like any other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tasks.report import comparison, costs
from tasks.shared.outputs import layout


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _measured(stage: str, encoder: str, **values: Any) -> str:
    """Hash of the outputs of a stage that took 90 seconds."""
    lineage = layout.out(stage, encoder) / "lineage.json"
    lineage.parent.mkdir(parents=True)
    lineage.write_text(f"{stage} {encoder}")
    found = hashlib.sha256(lineage.read_bytes()).hexdigest()
    reading = {"outputs": found, "seconds": 90.0, "processor_seconds": 80.0, "threads": 2, "processor": "A"} | values
    layout.cost(stage, encoder).parent.mkdir(parents=True, exist_ok=True)
    layout.cost(stage, encoder).write_text(json.dumps(reading))
    return found


def _shown() -> list[list[str]]:
    rows = comparison.with_costs([{"encoder": "swav"}, {"encoder": "pcl"}])
    return [[comparison.shown(row, name) for name in comparison.COSTS] for row in rows]


def _texts(script: str) -> dict[str, str]:
    (line,) = (line for line in script.splitlines() if line.startswith("const texts = "))
    found: dict[str, str] = json.loads(line.removeprefix("const texts = ").removesuffix(";"))
    return found


def test_costs_of_other_outputs_or_of_no_run_are_dashes() -> None:
    assert _shown() == [["–", "–"]] * 2
    _measured("pretrain", "swav")
    _measured("embed", "swav", images=7000, embedding_seconds=2.0)
    _measured("embed", "pcl")
    assert _shown() == [["1.5", "3,500"], ["–", "–"]]
    for stage in ("pretrain", "embed"):
        (layout.out(stage, "swav") / "lineage.json").write_text("made anew")
    assert _shown() == [["–", "–"]] * 2


def test_the_script_names_costs_by_their_outputs_and_holds_no_markup() -> None:
    trained = _measured("pretrain", "swav", processor='</script><b>\u2028"; alert(1)//')
    embedded = _measured("embed", "swav", images=7000, embedding_seconds=2.0)
    script = costs.script(comparison.with_costs([{"encoder": "swav"}, {"encoder": "pcl"}]))
    assert script.isascii()
    assert "<" not in script.partition("const texts")[2].partition("\n")[0]
    texts = _texts(script)
    note = texts.pop("note")
    assert texts == {trained: "1.5", embedded: "3,500"}
    assert note.endswith('on: </script><b>\u2028"; alert(1)//, 2 thread(s) and A, 2 thread(s).')
    assert _texts(costs.script([])) == {}
