"""Points the pipeline at a folder of images: what they are decides the encoders, and which commands come next."""

from __future__ import annotations

import math
import random
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

from deepclust.datasets import stacks
from deepclust.errors import CheckpointError, ConfigError, DataError
from deepclust.images import decode, depth, find, folders
from deepclust.images.reading import Reading
from deepclust.images.source import Source
from tasks.shared.operations import params
from tasks.shared.operations.params import overrides
from tasks.shared.operations.params.schema import Data, Params
from tasks.shared.outputs import layout

_LOOKED_AT = 100  # images that are opened, however many there are
_COLOUR_SIZE = 32  # pixels of a side at which colour is looked for
_RECIPES = Path("recipes")
_SMALL_SIDE, _SMALL_COUNT = 32, 20_000  # the small recipe does for images of at most so many pixels, or so many images
_UPDATES = 4  # of an epoch, at least
_LEAST_BATCH = 8
_BASELINES = ("pixels", "random", "pretrained")
# Of the workspace: what stages and servers write.
_RESULTS = tuple(str(path) for path in (layout.ARTIFACTS, layout.METRICS, layout.PLOTS, layout.STATE))
_NO_IMAGES = (*_RESULTS, ".venv", ".prefect", "mlartifacts", "mlruns")


class Found(NamedTuple):
    """What a folder holds.

    Attributes:
        images: Their number, those that can not be read included.
        training: About how many of them are for training: at least so many, if they are drawn.
        classes: Number of classes.
        looked_at: Images that were opened.
        side: Median of the shorter sides of these, in pixels.
        has_colour: Whether one of these has.
    """

    images: int
    training: int
    classes: int
    looked_at: int
    side: int
    has_colour: bool


def point_at(folder: Path) -> list[str]:
    """Write a folder of images, and the encoders that suit it, into params.yaml in one edit.

    Returns:
        Lines: what was found, the change as a diff, the reasons, and the commands that come next.

    Raises:
        DataError: If it is no folder of images that `prepare` could read.
        ConfigError: If params.yaml is not valid, or DVC can not follow the path; params.yaml stays as it was then.
    """
    values = params.load(whole=False)
    _check_place(folder)
    found = look(folder, values.data)
    encoders, reason = _choice(values, has_colour=found.has_colour)
    steps = _steps(encoders, values, found)

    def change(document: Any) -> None:
        document["data"].update(source="folder", folder=overrides.styled(str(folder)))
        if encoders != list(values.encoders):
            document["encoders"] = encoders

    difference = overrides.rewrite(layout.PARAMS, change) or f"{layout.PARAMS} says so already"
    classes = f" in {found.classes} classes" if found.classes else ""
    colour = "in colour" if found.has_colour else "grey"
    return [
        f"{folder}: {found.images} images{classes}, {colour}, shorter side {found.side} pixels (the median of "
        f"{found.looked_at})",
        *difference.splitlines(),
        "data: prepare reads this folder; docs/data.md says what it takes for classes, and for a test set",
        f"encoders: {reason}",
        *steps,
    ]


def look(folder: Path, data: Data) -> Found:
    """What a folder holds: all names, and of some images, drawn by their number alone, size and colour.

    Raises:
        DataError: If there is no such folder, or fewer than two images in it.
    """
    files = find.images(folder, data.follow_links)
    source: Source
    if files.stacks:
        source = stacks.load(str(folder), files)
    else:
        source = folders.load(str(folder), files, max_pixels=data.max_pixels)
    count = len(source.paths)
    if count < 2:
        raise DataError(f"expected two images or more in {folder}, one to train and one to test on, got 1; add some")
    how: dict[str, Any] = {name: getattr(data, name) for name in ("resize", "background", "pages", "bands")}
    seen: dict[int, decode.Inspected] = {}
    failed: list[str] = []
    for index in sorted(random.Random(0).sample(range(count), min(count, _LOOKED_AT))):
        try:
            seen[index] = source.inspect(index, Reading(**how))
        except DataError as error:
            failed.append(f"{source.paths[index]}: {error}")
    if not seen:
        raise DataError(f"expected images in {folder} that can be read, none of {len(failed)} can, first {failed[0]}")
    white = depth.settle([one.measured for one in seen.values() if one.measured], data.white)
    return Found(
        images=count,
        training=_training(source, data.test_fraction),
        classes=len(source.classes),
        looked_at=len(seen),
        side=median_low(min(one.width, one.height) for one in seen.values()),
        has_colour=data.colour != "grey"
        and source.channels != 1
        and any(_has_colour(source, index, Reading(**how, white=white)) for index in seen),
    )


def _has_colour(source: Source, index: int, reading: Reading) -> bool:
    """Whether an image has unequal red, green and blue, as `prepare` judges it; one that can not be read has none."""
    try:
        (pixels,) = source.read(index, reading, image_sizes=[_COLOUR_SIZE], channels=3)
    except DataError:
        return False
    return bool((pixels != pixels[..., :1]).any())


def _training(source: Source, test_fraction: float) -> int:
    count = len(source.paths)
    if source.sides is not None:
        return source.sides.count("train")
    spread = math.sqrt(count * test_fraction * (1 - test_fraction))  # each image is drawn for itself
    return max(1, math.floor(count * (1 - test_fraction) - 2 * spread))


def _check_place(folder: Path) -> None:
    """Refuse folders of ours and of git, whose files DVC would write and read at once.

    Raises:
        DataError: If the folder is one of these, or lies in it, or holds the repository.
    """
    workspace, place = Path.cwd().resolve(), folder.resolve()
    if workspace.is_relative_to(place):
        raise DataError(f"expected a folder of images, got {folder}, which holds this repository; name one within it")
    first = place.relative_to(workspace).parts[0] if place.is_relative_to(workspace) else ""
    if first in _NO_IMAGES or {".git", ".dvc"}.intersection(place.parts):
        where = first if first in _NO_IMAGES else ".git or .dvc"
        raise DataError(f"expected a folder of images, got {folder} in {where}; copy the images elsewhere")


def _choice(values: Params, *, has_colour: bool) -> tuple[list[str], str]:
    """The encoders that suit the images, and why."""
    from deepclust.methods import pretrained  # which imports torch

    listed = list(values.encoders)
    if frozen := [name for name, method in values.encoders.items() if method == "pretrained"]:
        grey = "" if has_colour else ", which sees grey repeated in three channels"
        return listed, f"{', '.join(listed)} stay: {frozen[0]} is among them{grey}"
    listed = listed if "pixels" in listed else ["pixels", *listed]
    named = ", ".join(listed)
    if not has_colour:
        return listed, (
            f"{named} stay: the weights of pretrained were made for colour; to try them with grey repeated in three "
            f"channels: python -m tasks.overrides 'encoders=[{named}, pretrained]'"
        )
    options = values.options("pretrained")
    assert isinstance(options, pretrained.Config)
    try:
        size = pretrained.wanted_size(options)
    except (CheckpointError, ConfigError) as error:
        return listed, f"{named} stay: {error}; then run this command again"
    return ["pixels", "pretrained"], (
        f"pretrained is frozen weights from elsewhere ({options.weights}, at {size} pixels), pixels what it has to "
        "beat; neither is trained; docs/photos.md says how to choose"
    )


def _steps(encoders: list[str], values: Params, found: Found) -> list[str]:
    """The commands that come next: clusters at once, then what adds training."""
    untrained = [name for name in encoders if values.encoders.get(name, name) in _BASELINES]
    lines = ["next, clusters before any training:"]
    if untrained != encoders:
        lines += [f"  python -m tasks.overrides 'encoders=[{', '.join(untrained)}]'"]
    lines += ["  make pipeline"]
    is_small = found.images <= _SMALL_COUNT or found.side <= _SMALL_SIDE
    recipe = _RECIPES / f"folder-{'small' if is_small else 'medium'}.yaml"
    usual = params.read(recipe)["pretrain"]["swav"]["batch_size"]
    batch = min(usual, 2 ** int(math.log2(max(1, found.training / _UPDATES))))
    if batch < _LEAST_BATCH:
        return [*lines, f"{found.images} images are too few to train an encoder on"]
    named = ", ".join(dict.fromkeys([*untrained, "random", "swav"]))
    smaller = f" pretrain.swav.batch_size={batch}" if batch < usual else ""
    why = f" ({found.training} or more for training; the recipe's batches of {usual} need more)" if smaller else ""
    return [
        *lines,
        f"to train an encoder on these images too{why}:",
        f"  python -m tasks.params apply {recipe}",
        f"  python -m tasks.overrides 'encoders=[{named}]'{smaller}",
        "  make pipeline",
    ]
