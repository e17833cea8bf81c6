"""How many planted copies are found, and how many of the pairs found are copies.

    python benchmarks/duplicates.py FOLDER [--originals 500] [--side 160] [--seed 0] [--checked FILE] [--sheet FILE]

FOLDER holds photographs in any folders; some of them, drawn by the seed, are copied in each of these ways: the file
itself, at half its size, as a JPEG of quality 40, mirrored, and 90 % of both sides cut out anywhere. The copies of one
way stand in test beside all photographs in train, so that ways do not help each other; `all` has all copies in test.
Images are read as `prepare` reads them, features are those of the encoder `pretrained`. A copy is found if it is in
the group of its original.

A pair that comes of two different photographs is right if a line of `--checked` holds both paths below FOLDER,
separated by a tab; otherwise it counts as wrong, and `--sheet` draws it, to be looked at.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from deepclust.clustering import neighbours
from deepclust.images.decode import read_image
from deepclust.images.reading import Reading
from deepclust.inspection import duplicates
from deepclust.methods.pretrained import Config, pretrained
from deepclust.models import features

ENDINGS = (".jpg", ".jpeg", ".png")
COLUMNS = ("copies", "planted", "recall", "pairs", "of copies", "of checked", "precision", "seconds")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"

Random = np.random.Generator


def _exact(path: Path, to: Path, random: Random) -> None:
    to.write_bytes(path.read_bytes())


def _resized(path: Path, to: Path, random: Random) -> None:
    image = Image.open(path).convert("RGB")
    image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.LANCZOS).save(to, "PNG")


def _recompressed(path: Path, to: Path, random: Random) -> None:
    Image.open(path).convert("RGB").save(to, "JPEG", quality=40)


def _mirrored(path: Path, to: Path, random: Random) -> None:
    ImageOps.mirror(Image.open(path).convert("RGB")).save(to, "PNG")


def _cropped(path: Path, to: Path, random: Random) -> None:
    image = Image.open(path).convert("RGB")
    width, height = round(0.9 * image.width), round(0.9 * image.height)
    left, top = random.integers(image.width - width + 1), random.integers(image.height - height + 1)
    image.crop((left, top, left + width, top + height)).save(to, "PNG")


WAYS: dict[str, Callable[[Path, Path, Random], None]] = {
    "exact": _exact,
    "resized": _resized,
    "recompressed": _recompressed,
    "mirrored": _mirrored,
    "cropped": _cropped,
}


class Photographs(NamedTuple):
    """Images (N, side, side, 3) uint8 and their features (N, D) float32."""

    images: NDArray[np.uint8]
    features: NDArray[np.float32]


def read(paths: list[Path], side: int) -> Photographs:
    """Photographs as `prepare` and the encoder `pretrained` make them."""
    how = {"image_size": side, "channels": 3, "max_pixels": 10**8}
    images = np.stack([read_image(path, Reading(), **how) for path in paths])
    encoder = pretrained(Config(weights="efficientnet_lite0", image_size=side), image_size=side, channels=3)
    return Photographs(images, features.extract(encoder, images, batch_size=16, device=torch.device("cpu")))


def plant(originals: list[Path], way: str, folder: Path, seed: int) -> list[Path]:
    """One copy of each original."""
    random = np.random.default_rng(seed)
    copies = [folder / f"{way}-{number}" for number in range(len(originals))]
    for original, copy in zip(originals, copies, strict=True):
        WAYS[way](original, copy, random)
    return copies


class Found(NamedTuple):
    """What one way's copies gave: a row of the table, and the pairs (P, 2) of photographs that are no known copies."""

    row: str
    wrong: NDArray[np.int64]


def measure(
    way: str, base: Photographs, copies: Photographs, originals: NDArray[np.int64], checked: set[tuple[int, int]]
) -> Found:
    """Find copies among photographs.

    Args:
        way: How the copies were made.
        base: The photographs.
        copies: One of each of `originals`.
        originals: Indices of photographs.
        checked: Pairs of photographs that are copies of each other, the lower index first.
    """
    graph = neighbours.graph(torch.from_numpy(np.concatenate([base.features, copies.features])), 10)
    start = time.perf_counter()
    found = duplicates.find(base.images, copies.images, graph.indices)
    seconds = time.perf_counter() - start
    groups = found.groups[: found.train][originals]
    recall = ((groups >= 0) & (groups == found.groups[found.train :])).mean()
    sources = np.sort(np.concatenate([np.arange(found.train), originals])[found.pairs], axis=1)
    different = sources[sources[:, 0] != sources[:, 1]]
    right = np.array([tuple(pair) in checked for pair in different.tolist()], bool)
    planted, pairs = len(sources) - len(different), len(sources)
    precision = (planted + right.sum()) / max(1, pairs)
    cells = [way, len(originals), f"{recall:.3f}", pairs, planted, right.sum(), f"{precision:.3f}", f"{seconds:.1f}"]
    return Found(f"| {' | '.join(map(str, cells))} |", np.unique(different[~right], axis=0))


def draw(pairs: NDArray[np.int64], images: NDArray[np.uint8], file: Path) -> None:
    """Pairs of images side by side, five pairs a row."""
    side = images.shape[1]
    sheet = Image.new("RGB", (5 * (2 * side + 8), -(-len(pairs) // 5) * (side + 8)), "grey")
    for place, pair in enumerate(pairs):
        for column, image in enumerate(pair):
            left, top = place % 5 * (2 * side + 8) + column * side, place // 5 * (side + 8)
            sheet.paste(Image.fromarray(images[image]), (left, top))
    sheet.save(file)


def main() -> None:
    """Plant, find, and print the table."""
    parser = argparse.ArgumentParser(prog="python benchmarks/duplicates.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--originals", type=int, default=500)
    parser.add_argument("--side", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checked", type=Path, help="pairs that were looked at and are copies")
    parser.add_argument("--sheet", type=Path, help="where to draw pairs that were neither planted nor checked")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if len(paths) < arguments.originals:
        parser.error(f"expected {arguments.originals} photographs in {arguments.folder}, found {len(paths)}")
    index = {path.relative_to(arguments.folder).as_posix(): number for number, path in enumerate(paths)}
    lines = arguments.checked.read_text(encoding="utf-8").splitlines() if arguments.checked else []
    checked = {tuple(sorted(index[name] for name in line.split("\t"))) for line in lines}
    random = np.random.default_rng(arguments.seed)
    originals = np.sort(random.choice(len(paths), arguments.originals, replace=False))
    base = read(paths, arguments.side)
    print(HEADER)
    planted, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            copies = plant([paths[number] for number in originals], way, Path(folder), arguments.seed)
            planted.append(read(copies, arguments.side))
            found = measure(way, base, planted[-1], originals, checked)
            print(found.row, flush=True)
            wrong.append(found.wrong)
    together = Photographs(*map(np.concatenate, zip(*planted, strict=True)))
    found = measure("all", base, together, np.tile(originals, len(WAYS)), checked)
    print(found.row)
    pairs = np.unique(np.concatenate([*wrong, found.wrong]), axis=0)
    for first, second in pairs:
        print(*(paths[number].relative_to(arguments.folder).as_posix() for number in (first, second)), sep="\t")
    if arguments.sheet and len(pairs):
        draw(pairs, base.images, arguments.sheet)


if __name__ == "__main__":
    main()
