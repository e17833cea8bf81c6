"""Overrides change what they name and nothing else, or nothing at all."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import parse_yaml

from deepclust.errors import ConfigError
from deepclust.methods.parts.options import TrainedConfig
from tasks.shared.operations import params
from tasks.shared.operations.params import overrides
from tests.paths import ROOT


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    return path


def _changed(before: str, after: str) -> list[str]:
    return [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[:2] in ("- ", "+ ")]


def test_only_the_named_line_changes_and_the_diff_says_so(file: Path) -> None:
    before = file.read_text()
    difference = overrides.apply(["pretrain.shared.batch_size=128"], file)
    assert _changed(before, file.read_text()) == [
        "-     batch_size: 256  # images of an update",
        "+     batch_size: 128  # images of an update",
    ]
    assert "+    batch_size: 128  # images of an update\n" in difference
    assert params.load(file).options("swav").batch_size == 128  # type: ignore[attr-defined]


def test_a_comment_stays_as_far_behind_the_value_as_it_was(file: Path) -> None:
    overrides.apply(["cluster.seeds=3", "data.folder=some/longer/path"], file)
    text = file.read_text()
    assert "\n  seeds: 3  # each algorithm" in text
    assert "\n  folder: some/longer/path  # the images" in text


def test_an_encoder_of_another_name_keeps_its_method_while_it_is_not_listed(file: Path) -> None:
    overrides.apply(["encoders={raw: pixels, swav: swav}", "pretrain.raw={image_size: 16}"], file)
    overrides.apply(["encoders=[swav]"], file)
    assert (params.load(file).encoders, params.load(file).method("raw")) == ({"swav": "swav"}, "pixels")
    overrides.apply(["encoders=[raw, swav]"], file)
    assert params.read(file)["encoders"] == {"raw": "pixels", "swav": "swav"}
    assert params.read(file)["pretrain"]["raw"] == {"image_size": 16}


def test_lists_items_and_nested_values_can_be_set_at_once(file: Path) -> None:
    before = file.read_text()
    edits = ["encoders=[pixels, swav]", "pretrain.swav.optimiser.rate=1e-2", "pretrain.swav.crops.1.count=4"]
    edits += ["cluster.k=7", "adapt.tsd.filter_k=null"]
    assert overrides.preview(edits, file).encoders == {"pixels": "pixels", "swav": "swav"}
    assert file.read_text() == before
    overrides.apply(edits, file)
    values = params.load(file)
    assert values.encoders == {"pixels": "pixels", "swav": "swav"}
    assert values.cluster.k == 7
    assert values.adapt.adapter("tsd").filter_k is None  # type: ignore[attr-defined]
    swav = values.options("swav")
    assert isinstance(swav, TrainedConfig)
    assert (swav.optimiser.rate, swav.crops[1].count) == (0.01, 4)
    assert len(_changed(before, file.read_text())) == 2 * len(edits)


def test_the_repositorys_own_file_survives_a_round_trip_unchanged(file: Path) -> None:
    before = file.read_bytes()
    assert overrides.apply([], file) == ""
    assert overrides.apply([f"seed={params.load(file).seed}"], file) == ""
    assert file.read_bytes() == before


# Of each kind that YAML would read as something else.
TEXTS = """shots #2|#2|# images|2024-01-05|12:30:00|1e5|0x10|0o17|010|1_000|.5|.inf|-|yes|no|on|true|~|null
a: b|~/images|a:|x,y|[x|[x]|{x|{x: 1}|*a|&a|!x|!!str 5|%a|@a|`a|>|"|- a|? a|---|=|<<|it's|say "hi"|"a" "b"|C:\\new
Bücher/😀| a|a |  a  #b   # c|  # the images"""
PLACES = ("data.folder", "adapt.domains", "pretrain.pretrained.weights")


def _at(raw: dict[str, Any], dotted: str) -> Any:
    found: Any = raw
    for part in dotted.split("."):
        found = found[part]
    return found


def test_a_text_is_taken_as_it_is_and_read_back_as_it_is_by_us_and_by_dvc(file: Path) -> None:
    texts = [*TEXTS.replace("\n", "|").split("|"), "|", "a\tb", "a\nb", "a\x85b", "a\u2028b", "\x1b[0m"]
    before = params.read(file)
    for start in range(0, len(texts), len(PLACES)):
        chosen = dict(zip(PLACES, texts[start:], strict=False))
        overrides.apply([f"{place}={text}" for place, text in chosen.items()], file)
        if start % 9 == 0:
            overrides.apply(["seed=5"], file)  # an edit of something else leaves them as they are
        content = file.read_text(encoding="utf-8")
        for found in (params.read(file), parse_yaml(content, "params.yaml"), parse_yaml(content, "params.yaml", "rt")):
            assert {place: _at(found, place) for place in chosen} == chosen
    for place in PLACES:
        overrides.apply([f"{place}={_at(before, place)}"], file)
    assert params.read(file) == before | {"seed": 5}


def test_an_encoder_with_weights_from_elsewhere_is_two_edits_that_state_only_what_matters(file: Path) -> None:
    last = "    zero_init_residual: false\n\nembed:"
    assert last in file.read_text(encoding="utf-8")
    section = "{weights: timm, backbone: timm/vit_small_patch14_dinov2.lvd142m}"
    overrides.apply(["encoders.dino=pretrained", f"pretrain.dino={section}"], file)
    text = file.read_text(encoding="utf-8")
    assert f"  dino: {section}\n" in text
    assert last in text, "the empty line stays where it was"
    assert params.load(file).options("dino").image_size == "auto"  # type: ignore[attr-defined]
    overrides.apply(["pretrain.dino.image_size=224"], file)
    assert params.load(file).options("dino").image_size == 224  # type: ignore[attr-defined]


def test_yamls_quotes_and_null_keep_their_meaning_where_they_have_one(file: Path) -> None:
    digits = "1" * 30 + "e" + "2" * 33  # a number in YAML
    overrides.apply(["pretrain.pretrained.weights=weights.safetensors"], file)  # only files have a hash
    for edit, value in {
        "data.folder='it''s'": "it's",
        'data.folder="a\\tb"': "a\tb",
        "data.folder=null": "null",
        f"pretrain.pretrained.sha256={digits}": digits,
        "pretrain.pretrained.sha256=null": None,
        "pretrain.pretrained.sha256=~": None,
        "adapt.tsd.compat=original": "original",
        "adapt.adapters.1=t3a": "t3a",
        "adapt.adapters=[source, bn]": ["source", "bn"],
        "encoders.random=random": "random",
        "cluster.k=auto": "auto",
        "cluster.k=7": 7,
    }.items():
        extra = ["adapt.adapters=[source, tent]"] if edit.startswith("adapt.adapters.") else []
        overrides.apply([*extra, edit], file)
        place, _, _ = edit.partition("=")
        if place == "adapt.adapters.1":
            assert params.read(file)["adapt"]["adapters"] == ["source", value]
        else:
            assert _at(params.read(file), place) == value


def test_a_recipes_text_is_read_back_as_it_is(file: Path, tmp_path: Path) -> None:
    overrides.apply(["data.folder='quoted'"], file)  # in whose quotes ruamel.yaml would write the next
    (tmp_path / "mine.yaml").write_text('data: {folder: "a\\Nb #2"}\n')
    overrides.apply_recipe(tmp_path / "mine.yaml", file)
    assert params.read(file)["data"]["folder"] == "a\x85b #2"


def test_a_section_can_differ_from_a_shared_block_in_one_value(file: Path) -> None:
    before = file.read_text()
    edits = ["moco.optimiser.rate=0.3", "moco.crops.0.size=20", "simsiam.batch_size=64", "simsiam.colour.blur=1.0"]
    overrides.apply([f"pretrain.{edit}" for edit in edits], file)
    values = params.load(file)
    moco, simsiam = values.options("moco"), values.options("simsiam")
    assert isinstance(moco, TrainedConfig)
    assert isinstance(simsiam, TrainedConfig)
    assert (moco.optimiser.rate, moco.optimiser.weight_decay) == (0.3, 5e-4)
    assert (moco.crops[0].size, moco.crops[0].scale) == (20, (0.4, 1.0))
    assert (simsiam.batch_size, simsiam.colour.blur, simsiam.colour.jitter) == (64, 1.0, 1.0)
    assert simsiam.crops[0].size == 0.79
    assert [line[2:] for line in _changed(before, file.read_text())] == [
        "    crops:",
        "      - {count: 2, size: 20, scale: [0.4, 1.0], ratio: [1.0, 1.0]}",
        "    optimiser: {rate: 0.3}",
        "    colour: {blur: 1.0}",
        "    batch_size: 64",
    ]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("pretrain.swav.epoch=5", r"^pretrain\.swav\.epoch: unknown parameter; did you mean epochs\?$"),
        (
            "pretrain.swav.optimiser.name=adamw",
            r"^pretrain\.swav\.optimiser\.rate: missing, as are weight_decay, .*betas; ",
        ),
        (
            "pretrain.shared.optimiser.betas=[0.9, 0.9]",
            r"^pretrain\.shared\.optimiser\.betas: unknown parameter of sgd$",
        ),
        ("pretrain.swav.optimiser=adamw", r"^pretrain\.swav\.optimiser: expected a mapping, got 'adamw'$"),
        ("pretrain.swav.epochs=many", r"^pretrain\.swav\.epochs: .*got 'many'$"),
        ("pretrain.swav.crops.7.count=1", r"^pretrain\.swav\.crops\.7: expected an item from 0 to 1, got '7'$"),
        ("data.source=MNIST #2", r"^data\.source: .*, got 'MNIST #2'$"),
        ("encoders.swav=swav #2", r"^encoders\.swav: expected a method .*, got 'swav #2'; did you mean swav\?$"),
        ("encoders=[swav, 2024-01-05]", r"^encoders: expected names, got 2024-01-05; put it into quotes$"),
        ("adapt.tsd.compat=original #2", r"^adapt\.tsd\.compat: expected 'original', got 'original #2'$"),
        ("pretrain.swav.method=swav #2", r"^pretrain\.swav\.method: expected 'swav', .* got 'swav #2'"),
        ("adapt.adapters=[1e5]", r"^adapt\.adapters\.0: expected a valid string, got 100000\.0; put it into quotes$"),
        ("data.folder=", r"^data\.folder: expected the path of a folder, got ''; name one, such as path/to/images$"),
        ("data.folder=a\udcff", r"^data\.folder: expected text in UTF-8, got 'a\\udcff'; rename it$"),
        ("seed.x=1", r"^seed\.x: seed is 5 and has no parameters below it$"),
        ("seed", r"^expected an override like pretrain\.swav\.epochs=5, got 'seed'$"),
        ("encoders=[pixels", r"^encoders: expected a YAML value, got '\[pixels'"),
        ("pretrain.pcl.queue_length=1000", r"^pretrain\.pcl: queue_length 1000 must be a multiple of batch_size 64"),
    ],
)
def test_a_wrong_override_is_one_line_and_nothing_is_written(file: Path, edit: str, message: str) -> None:
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=message) as caught:
        overrides.apply(["seed=5", edit], file)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
