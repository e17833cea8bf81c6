"""What reading photographs costs beside torchvision's ImageFolder, and how far the pixels are from a full decode.

python benchmarks/decoding.py --images FOLDER [--count 100] [--rounds 7]

The photographs of a folder are read as they are, and enlarged to 1000 x 800 pixels (JPEG of quality 90, 4:2:0), at 224
and at 64 pixels. Each image is read by both in turn, on one thread, from the page cache. ImageFolder is its loader with
Resize and CenterCrop, to a uint8 array. The difference, in levels of 255, is from a full decode and Pillow's bicubic.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.datasets.folder import default_loader

from deepclust.images.decode import read_image
from deepclust.images.reading import Reading

SIDES = (224, 64)
LARGE = (1000, 800)
BICUBIC = Image.Resampling.BICUBIC

Pixels = NDArray[np.uint8]
Reader = Callable[[Path], Pixels]


class Costs(NamedTuple):
    """Images a core-second of two readers, and of each round their ratio, sorted."""

    ours: float
    theirs: float
    ratios: list[float]


def image_folder(side: int) -> Reader:
    """Torchvision's way, from a path to (side, side, 3) uint8."""
    transform = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])
    return lambda path: np.asarray(transform(default_loader(path)))


def full(path: Path, side: int) -> Pixels:
    """All pixels decoded, then an antialiased bicubic reduction of the centre."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    return np.asarray(ImageOps.fit(image, (side, side), BICUBIC))


def costs(ours: Reader, theirs: Reader, paths: list[Path], rounds: int) -> Costs:
    """Both readers image by image, each first every other time."""
    seconds = np.zeros((rounds, 2))
    for round_ in range(-1, rounds):  # the first only warms up
        for number, path in enumerate(paths):
            for which in (0, 1) if number % 2 else (1, 0):
                started = time.process_time()
                (ours, theirs)[which](path)
                seconds[max(round_, 0), which] += time.process_time() - started
        if round_ < 0:
            seconds[0] = 0
    ours_, theirs_ = (len(paths) / median(column) for column in seconds.T.tolist())
    return Costs(ours_, theirs_, sorted((seconds[:, 1] / seconds[:, 0]).tolist()))


def row(name: str, paths: list[Path], side: int, rounds: int) -> str:
    """A line of the table."""
    ours = partial(read_image, reading=Reading(), image_size=side, channels=3, max_pixels=10**9)
    found = costs(ours, image_folder(side), paths, rounds)
    off = [float(np.abs(ours(path).astype(int) - full(path, side)).mean()) for path in paths]
    low, high = found.ratios[0], found.ratios[-1]
    return (
        f"| {name} | {side} | {found.ours:.0f} | {found.theirs:.0f} | {median(found.ratios):.2f} ({low:.2f} to "
        f"{high:.2f}) | {np.mean(off):.2f} | {max(off):.2f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG photographs")
    parser.add_argument("--count", type=int, default=100, help="how many of them, spread over the folder")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is read")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = sorted(file for file in arguments.images.rglob("*") if file.suffix.lower() in {".jpg", ".jpeg"})
    if not found:
        raise SystemExit(f"error: expected JPEG images below {arguments.images}, found none")
    paths = found[:: max(1, len(found) // arguments.count)][: arguments.count]
    print("| images | side | images/core-second | ImageFolder | ratio (spread) | mean difference | worst image |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="deepclust-") as folder:
        large = [Path(folder, f"{number}.jpg") for number in range(len(paths))]
        for path, target in zip(paths, large, strict=True):
            enlarged = ImageOps.fit(Image.open(path).convert("RGB"), LARGE, BICUBIC)
            enlarged.save(target, quality=90, subsampling="4:2:0")
        for name, files in {"{} x {}".format(*LARGE): large, "as they are": paths}.items():
            for side in SIDES:
                print(row(name, files, side, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
