"""Registration: once per content, and champions that only the better can replace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.model import register
from tasks.model.register import champion
from tasks.shared.operations import params, provenance, tracking
from tasks.shared.outputs import layout, lineage
from tests.paths import ROOT


def version(number: int, data: str = "d", **scores: float) -> Any:
    tags = {"data.hash": data} | {name: repr(score) for name, score in scores.items()}
    return SimpleNamespace(version=number, tags=tags)


def test_the_champion_is_the_better_on_the_same_data() -> None:
    for versions, best in (
        ([version(1, knn_heldout=0.8, rankme=9), version(2, knn_heldout=0.81, rankme=5)], 2),  # labels before RankMe
        ([version(1, rankme=9), version(2, rankme=5)], 1),
        ([version(1, knn_heldout=0.8), version(2, knn_heldout=0.8)], 2),  # the newest of equals
        ([version(1, knn_heldout=0.9, data="old"), version(2, knn_heldout=0.5)], 2),  # other data says nothing
    ):
        assert champion(versions, "d").version == champion(versions[::-1], "d").version == best


@pytest.fixture
def client(here: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of the store of a workspace in which every stage ran."""
    shutil.copy(empty_store, here)
    for path in here.rglob(lineage.FILE):  # for the tests change the files
        path.unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'mlflow.db'}")
    for name in (tracking.PARENT, tracking.store.SWITCH):
        monkeypatch.delenv(name, raising=False)
    return tracking.connect()[0]


def write(path: Path, **values: Any) -> None:
    """Change values of a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values))


def retrain(knn: float) -> str:
    """Register another classifier, of another held-out accuracy."""
    write(layout.out("linear", "swav") / "classifier.json", weight_decay=knn)
    write(layout.metrics("linear", "swav"), knn_heldout=knn)
    return register.register("swav").removeprefix("deepclust-swav version ")


def test_a_version_per_content_and_an_alias_that_moves_to_the_better_only(client: Any) -> None:
    with tracking.stage_run("pretrain", "swav", params.load()) as trained:
        pass
    found = [retrain(knn) for knn in (0.8, 0.8, 0.7)]
    assert found == ["1 (champion)", "1 (champion)", "2 (champion stays version 1)"]
    first = client.get_model_version("deepclust-swav", "1")
    data = json.loads(layout.META.read_text())["content_hash"]
    assert first.run_id == trained.run_id
    assert first.tags.items() >= {"run": trained.run_id, "data.hash": data, "knn_heldout": "0.8"}.items()
    write(layout.META, content_hash="data-2")
    assert retrain(0.7) == "3 (champion)", "only test images changed"
    assert len(client.search_model_versions("name='deepclust-swav'")) == 3
    assert str(client.get_model_version_by_alias("deepclust-swav", register.ALIAS).version) == "3"


def test_changed_code_of_a_prediction_is_a_new_version_and_a_remark_in_the_errors_is_none(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("deepclust", "tasks"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    contents = [register._content(register._files("swav"), "d")]
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    for file in ("deepclust/errors.py", *(provenance.source_files(place)[-1] for place in register.CODE)):
        with (tmp_path / file).open("a") as out:
            out.write("# a remark\n")
        contents.append(register._content(register._files("swav"), "d"))
    assert contents[0] == contents[1]
    assert len(set(contents)) == 1 + len(register.CODE)


def test_a_stored_model_asks_for_timm_where_it_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for backbone, needed in (("resnet18", set()), ("timm/test_vit", {"timm"})):
        write(layout.out("pretrain", "any") / "encoder.json", backbone=backbone)
        found = {line.partition("==")[0] for line in register._requirements("any")}
        assert found & {"timm", "torch", "safetensors"} == {"torch", "safetensors"} | needed


def test_an_encoder_that_has_not_run_is_named_and_nothing_is_registered_while_tracking_is_off(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(tracking.store.SWITCH, raising=False)
    monkeypatch.setattr("sys.argv", ["register", "--encoder", "moco"])
    with pytest.raises(SystemExit, match="2"):
        register.main()
    assert "artifacts/pretrain/moco/encoder.safetensors to register moco" in capsys.readouterr().err
    monkeypatch.setenv(tracking.store.SWITCH, "off")
    register.main()
    assert "tracking is off" in capsys.readouterr().out
