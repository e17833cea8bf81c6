"""Earlier parameter files: one line for each key that moved, and values that stay."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from deepclust.errors import ConfigError
from tasks.shared.operations import params
from tasks.shared.operations.params import command, migration
from tests.paths import ROOT


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """params.yaml as it was: encoders a list, a method in its section, no engines."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    text = re.sub(r"^encoders: .*$", "encoders: [pixels, swav, mine]  # all of them", text, flags=re.M)
    text = re.sub(r"^ +(kmeans_)?engine: .*\n", "", text, flags=re.M)
    text = re.sub(r"^  (encoders|budget): .*\n", "", text, flags=re.M).replace("  images: auto", "  images: 500")
    mine = text[text.index("  pcl:") : text.index("  simsiam:")].replace("  pcl:", "  mine:\n    method: pcl", 1)
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("  simsiam:", f"{mine}  simsiam:", 1), encoding="utf-8")
    return path


def test_every_moved_key_has_a_line_and_the_rest_stays(earlier: Path) -> None:
    before = params.read(earlier)
    with pytest.raises(ConfigError, match=r"encoders: expected .*got a list; run `python -m tasks.params migrate`"):
        params.load(earlier)
    lines, difference = migration.migrate(earlier)
    assert lines == [
        "encoders: now a mapping of each encoder to its method",
        "pretrain.mine.method: now encoders.mine",
        "adapt.encoders: new, auto",
        "adapt.budget: new, null",
        "pretrain.pcl.kmeans_engine: new, faiss",
        "pretrain.deepcluster_v2.kmeans_engine: new, faiss",
        "pretrain.mine.kmeans_engine: new, faiss",
    ]
    assert "-encoders: [pixels, swav, mine]" in difference
    assert "# all of them" in earlier.read_text(encoding="utf-8")
    values = params.load(earlier)
    assert values.encoders == {"pixels": "pixels", "swav": "swav", "mine": "pcl"}
    after = params.read(earlier)
    assert after["data"] == before["data"]
    assert after["adapt"] == before["adapt"] | {"encoders": "auto", "budget": None}, (
        "images keep their number, and nobody is left out"
    )
    assert after["pretrain"]["swav"] == before["pretrain"]["swav"]
    assert migration.migrate(earlier) == ([], "")


def test_k_means_becomes_one_algorithm_of_several_and_the_rule_for_k_an_estimate(tmp_path: Path) -> None:
    path, text = tmp_path / "params.yaml", (ROOT / "params.yaml").read_text(encoding="utf-8")
    before, after = text[: text.index("cluster:")], text[text.index("linear:") :]
    earlier = (
        "cluster:\n  k: auto  # the primary k\n  other_k: [5, 20]\n  seeds: 10\n  restarts: auto\n  iterations: 30\n"
    )
    path.write_text(f"{before}{earlier}  normalise: false\n  silhouette_images: 50\n  gallery_images: 4\n\n{after}")
    with pytest.raises(ConfigError, match=r"^cluster.algorithms: missing, .*`python -m tasks.params migrate` adds"):
        params.load(path)
    lines, _ = migration.migrate(path)
    assert [line for line in lines if not line.startswith("cluster.") or ": new" not in line] == [
        "cluster.iterations: now cluster.kmeans.iterations",
        "cluster.restarts: now cluster.kmeans.restarts",
        "cluster.k: now classes, the number of classes; where there are none it is estimated, and no longer "
        "sqrt(images / 2); auto estimates it in any case",
        "cluster.other_k: no longer fits of their own, but cuts of one tree of clusters",
    ]
    cluster = params.load(path).cluster
    assert (cluster.algorithms, cluster.k, cluster.reject, cluster.duplicates) == (("kmeans",), "classes", 0, "keep")
    options = cluster.algorithm("kmeans")
    assert (options.iterations, options.restarts, options.engine) == (30, "auto", "faiss")
    assert migration.migrate(path) == ([], "")


@pytest.mark.parametrize(("size", "pixels"), [("auto", 64), ("96", 96)])
def test_the_size_of_all_images_becomes_that_of_networks_and_pixels_keep_what_they_had(
    tmp_path: Path, size: str, pixels: int
) -> None:
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    text = re.sub(r"^    image_size: .*\n", "", text, flags=re.M)
    text = text.replace("pixels: {image_size: 32}  # at most", "pixels: {}\n  raw: {}\n  last: {}")
    text = text.replace("encoders: {", "encoders: {raw: pixels, last: pixels, ")
    path.write_text(text.replace("data:\n", f"data:\n  image_size: {size}  # pixels\n", 1), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"^data.image_size: every encoder .* pretrain.shared.image_size, .*tasks.params migrate"
    ):
        params.load(path)
    lines, difference = migration.migrate(path)
    assert lines == [
        f"data.image_size: now pretrain.shared.image_size, {size}; pixels and pretrained weights have their own",
        *(f"pretrain.{name}.image_size: new, {pixels}" for name in ("pixels", "raw", "last")),
    ]
    assert "-  image_size:" in difference
    values = params.load(path)
    sizes = {name: values.image_size(name) for name in ("swav", "random", "pixels", "raw", "last")}
    assert sizes == {"swav": values.pretrain.shared.image_size, "random": sizes["swav"]} | dict.fromkeys(
        ("pixels", "raw", "last"), pixels
    )
    assert str(sizes["swav"]) == size
    assert migration.migrate(path) == ([], "")


def test_a_recipe_gets_no_keys_that_it_did_not_have(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("encoders: [pixels, swav]\npretrain:\n  pcl: {epochs: 3}\n", encoding="utf-8")
    assert migration.migrate(recipe)[0] == ["encoders: now a mapping of each encoder to its method"]
    assert params.read(recipe) == {"encoders": {"pixels": "pixels", "swav": "swav"}, "pretrain": {"pcl": {"epochs": 3}}}


def test_the_size_that_a_pretrained_network_gets_keeps_its_value_and_null_is_what_the_weights_were_made_for(
    earlier: Path,
) -> None:
    text = earlier.read_text(encoding="utf-8")
    begin, end = text.index("  pretrained:"), text.index("  swav:")
    file = "    backbone: resnet18\n    weights: w.safetensors\n    input_size: {}  # of a side\n    sha256: null\n"
    sections = f"  pretrained:\n{file.format('null')}    mean: null\n    std: null\n  other:\n{file.format(96)}"
    text = text[:begin] + sections + "    method: pretrained\n" + text[end:]
    earlier.write_text(text.replace("encoders: [pixels,", "encoders: [pixels, other,"), encoding="utf-8")
    lines, _ = migration.migrate(earlier)
    assert "pretrain.pretrained.input_size: now image_size, auto, what the weights were made for" in lines
    assert "pretrain.other.input_size: now image_size, 96" in lines
    after = earlier.read_text(encoding="utf-8")
    assert "    weights: w.safetensors\n    image_size: auto  # of a side\n    sha256: null\n" in after
    assert "    image_size: 96  # of a side\n" in after
    found = params.load(earlier).options("pretrained")
    assert (found.backbone, found.image_size) == ("resnet18", "auto")  # type: ignore[attr-defined]
    assert migration.migrate(earlier) == ([], "")


@pytest.mark.parametrize("section", ["data", "pretrain", "pretrain.shared", "cluster", "adapt"])
@pytest.mark.parametrize("value", ["text", "null", "[1]"])
def test_a_section_that_is_no_mapping_is_named(tmp_path: Path, section: str, value: str) -> None:
    path, key = tmp_path / "params.yaml", section.rpartition(".")[2]
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    path.write_text(re.sub(rf"^( *){key}:.*\n((\1 .*)?\n)*", rf"\1{key}: {value}\n", text, count=1, flags=re.M))
    before = path.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"^{section}: expected a mapping, got "):
        migration.migrate(path)
    assert path.read_text(encoding="utf-8") == before


def test_the_command_shows_lines_and_diff_and_a_broken_file_stays(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(earlier.parent)
    shutil.copy(earlier, "other.yaml")
    monkeypatch.setattr("sys.argv", ["params", "migrate", "other.yaml"])
    command.main()
    assert "adapt.budget: new, null\n" in capsys.readouterr().out
    broken = earlier.read_text(encoding="utf-8").replace("seed: 0", "seed: none")
    earlier.write_text(broken, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["params", "migrate"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: seed: ")
    assert earlier.read_text(encoding="utf-8") == broken
