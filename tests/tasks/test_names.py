"""No entrance takes a name that a shell would run or that leads out of its folder; none reaches a shell at all."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dvc.exceptions import DvcException
from dvc.repo import Repo
from prefect.logging import disable_run_logger

import flows.pipeline
import flows.stage
from deepclust.errors import ConfigError
from tasks.model import assign, register
from tasks.shared.operations import params
from tasks.shared.operations.params import command, overrides
from tests import pipelines
from tests.paths import ROOT

SHELL = ["a; touch marker", "$(touch marker)", "`touch marker`", "a\ntouch marker", "a' && touch marker '", 'a" | b "']
PATHS = ["../victim", "../../victim", "..", "a/../../victim", "a/../../../victim"]
OTHERS = ["", ".", ".hidden", "-rf", "a.b", "a/b", "a b", "a@b", "ä", "a\0b", "x" * 65]
HOSTILE = "../$(touch marker)"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of DVC's own calls


def test_the_schema_refuses_a_name_as_an_encoder_and_as_a_section_in_one_line() -> None:
    raw = params.read(ROOT / "params.yaml")
    for name in [*SHELL, *PATHS, *OTHERS]:
        sections = raw["pretrain"] | {name: raw["pretrain"]["swav"]}
        for change in ({"encoders": {name: "swav"}, "pretrain": sections}, {"pretrain": sections}):
            with pytest.raises(ConfigError, match=r"expected a name of at most 64 letters") as caught:
                params.parse(raw | change, whole=False)
            assert "\n" not in str(caught.value)
    sections = raw["pretrain"] | {"Wide_2-b": raw["pretrain"]["swav"]}
    assert params.parse(raw | {"encoders": {"Wide_2-b": "swav"}, "pretrain": sections}).method("Wide_2-b") == "swav"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with the real dvc.yaml, over stages that note what reaches them, inside of a folder."""
    root = tmp_path / "outer" / "work"
    pipelines.build(root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8").replace("python -m tasks.", f"{sys.executable} made.py ")
    Path("dvc.yaml").write_text(text, encoding="utf-8")
    Path("made.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]), file=open('got', 'a'))\n")
    return root


def hostile(*names: str) -> None:
    """Name encoders so in params.yaml, as only a hand can do it."""
    raw = params.read()
    raw |= {"encoders": dict.fromkeys(names, "random"), "pretrain": raw["pretrain"] | {name: {} for name in names}}
    Path("params.yaml").write_text(json.dumps(raw), encoding="utf-8")  # which is YAML


def test_what_dvc_runs_gets_an_encoders_name_as_one_word_whatever_it_holds(root: Path) -> None:
    hostile(*SHELL)
    for name in SHELL:
        with Repo() as repo, pytest.raises(DvcException):  # the stage writes no outputs
            repo.reproduce(f"linear@{name}", single_item=True, force=True, allow_missing=True)
    got = [json.loads(line) for line in Path("got").read_text().splitlines()]
    assert got == [["linear", f"linear@{name}"] for name in SHELL]
    assert not list(root.parent.rglob("marker"))


@pytest.mark.parametrize("name", PATHS)
def test_dvc_deletes_nothing_for_a_name_that_leads_elsewhere(root: Path, name: str) -> None:
    hostile(name)
    victims = [root.parent / "victim", root / "victim", root / "artifacts/victim"]
    for victim in victims:
        victim.parent.mkdir(exist_ok=True)
        victim.write_text("mine")
    for target in (f"pretrain@{name}", None):
        with Repo() as repo, pytest.raises(DvcException):
            repo.reproduce(target, force=True, allow_missing=True)
    assert [victim.read_text() for victim in victims] == ["mine"] * 3
    assert not Path("got").exists()


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("name", ["swav", "linear@swav", "../dvc.yaml:linear@swav"])
def test_a_stage_takes_an_encoder_by_hand_and_its_own_name_from_dvc_below_the_root_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    overrides.apply(["encoders=[swav]"])
    monkeypatch.setattr(sys, "argv", ["tasks.linear", name])
    with pytest.raises(SystemExit, match="2"):
        stage("linear")()
    assert "artifacts/prepare/meta.json, found none; run `dvc repro prepare`" in capsys.readouterr().err


@contextmanager
def refused(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """The body ends with status 2 and one line that shows the name as Python writes it, and leaves all files alone."""
    before = {path: path.read_bytes() for path in Path("..").rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        yield
    said = capsys.readouterr().err
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    assert "touch marker" in said
    after = {path: path.read_bytes() for path in Path("..").rglob("*") if path.is_file()}
    for files in (before, after):
        files.pop(Path("..", Path.cwd().name, "state", "flow.lock"), None)
    assert after == before


def stage(name: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(f"tasks.{name}.__main__").main()


NAMING = {
    **{f"tasks.{name}": (stage(name), [HOSTILE]) for name in ("pretrain", "embed", "cluster", "linear", "adapt")},
    "tasks.embed, from DVC": (stage("embed"), [f"embed@{HOSTILE}"]),
    "tasks.assign": (assign.main, ["--encoder", HOSTILE, "images"]),
    "tasks.register": (register.main, ["--encoder", HOSTILE]),
    "tasks.params show": (command.main, ["show", HOSTILE]),
    "tasks.params apply": (command.main, ["apply", "recipe.yaml"]),
    "tasks.overrides": (overrides.main, [f"encoders={json.dumps({HOSTILE: 'swav'})}"]),
    "tasks.overrides of a section": (overrides.main, ["pretrain.$(touch marker)={}"]),
    "flows.pipeline --stages": (flows.pipeline.main, ["--stages", HOSTILE]),
    "flows.pipeline --encoders": (flows.pipeline.main, ["--encoders", HOSTILE]),
    "flows.pipeline --override": (flows.pipeline.main, ["--override", f"encoders={json.dumps({HOSTILE: 'swav'})}"]),
}
# These take no name, but a params.yaml that has one.
READING = {
    "tasks.prepare": (stage("prepare"), []),
    "tasks.linear": (stage("linear"), ["swav"]),
    "tasks.report": (stage("report"), []),
    "tasks.assign": (assign.main, ["--encoder", "swav", "images"]),
    "tasks.register": (register.main, []),
    "tasks.params check": (command.main, ["check"]),
    "tasks.params show": (command.main, ["show"]),
    "tasks.params migrate": (command.main, ["migrate"]),
    "tasks.overrides": (overrides.main, ["seed=1"]),
    "flows.pipeline": (flows.pipeline.main, []),
}


@pytest.mark.usefixtures("root")
def test_every_entrance_refuses_a_hostile_name_and_a_file_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(json.dumps({"encoders": {HOSTILE: "swav"}, "pretrain": {HOSTILE: {}}}))
    for entrances in (NAMING, READING):
        for main, words in entrances.values():
            monkeypatch.setattr(sys, "argv", ["program", *words])
            with refused(capsys):
                main()
        hostile(HOSTILE)
    with disable_run_logger():
        for name in ("prepare", "embed@swav", f"embed@{HOSTILE}"):
            state = flows.stage.stage.fn(name)
            assert (state.is_failed(), "expected a name of at most" in state.message) == (True, True)
    assert not list(Path("..").rglob("marker"))
    assert not Path("got").exists()
