"""Every recipe applies over params.yaml, shows what it changed, keeps the rest, and says what its numbers rest on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deepclust.errors import ConfigError
from deepclust.training.optim import AdamW
from tasks.shared.operations import params
from tasks.shared.operations.params import command, overrides
from tests.paths import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    return tmp_path / "params.yaml"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_applies_in_full_and_says_where_its_numbers_come_from(recipe: Path, file: Path) -> None:
    difference = overrides.apply_recipe(recipe, file)
    assert bool(difference) == (recipe.stem != "fashion-mnist-small"), "the default says what params.yaml says"
    _assert_within(params.read(recipe), params.load(file).resolved())
    text = recipe.read_text(encoding="utf-8")
    assert "\n# Numbers: " in text
    assert "\n# Run here: " in text
    assert overrides.apply_recipe(recipe, file) == "", "a second time changes nothing"


def _assert_within(part: object, whole: object) -> None:
    if isinstance(part, dict):
        assert isinstance(whole, dict)
        for key, value in part.items():
            _assert_within(value, whole[key])
    else:
        assert part == whole


def test_the_default_recipe_leads_back_from_all_others(file: Path) -> None:
    before = params.load(file).resolved()
    for recipe in [*RECIPES, ROOT / "recipes" / "fashion-mnist-small.yaml"]:
        overrides.apply_recipe(recipe, file)
    assert params.load(file).resolved() == before


def test_what_a_recipe_does_not_name_stays_with_its_comments(file: Path, tmp_path: Path) -> None:
    before = file.read_text(encoding="utf-8").splitlines()
    (tmp_path / "mine.yaml").write_text("pretrain: {swav: {epochs: 9}}\n")
    difference = overrides.apply_recipe(tmp_path / "mine.yaml", file)
    after = file.read_text(encoding="utf-8").splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [("    epochs: 6", "    epochs: 9")]
    assert "-    epochs: 6\n+    epochs: 9\n" in difference


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "pretrain: {swav: {epoch: 9}}",
            r"mine\.yaml: pretrain\.swav\.epoch: unknown parameter; did you mean epochs\?$",
        ),
        (None, r"expected a recipe in .*mine\.yaml, found none; there are: .*params\.yaml"),
    ],
)
def test_a_bad_recipe_is_one_line_and_changes_nothing(
    file: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    before = file.read_bytes()
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        overrides.apply_recipe(tmp_path / "mine.yaml", file)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before


def test_applying_is_a_command_that_shows_the_change_and_takes_no_option_of_the_old_optimiser_along(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr("sys.argv", ["params", "apply", str(ROOT / "recipes" / "cifar10-resnet18.yaml")])
    command.main()
    assert "-    backbone: small" in (out := capsys.readouterr().out)
    assert "+    backbone: resnet18" in out
    assert isinstance(params.load(file).options("swav").optimiser, AdamW)  # type: ignore[attr-defined]
    assert "momentum" not in params.read(file)["pretrain"]["swav"]["optimiser"]
