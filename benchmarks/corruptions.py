"""What every corruption looks like at every severity, and what it costs.

python benchmarks/corruptions.py --out sheet.png [--images FOLDER] [--count 3]

The sheet has a row for each corruption and, for each image, the clean one and severities 1 to 5. The table counts
milliseconds on one thread for 1000 images at severity 5, in batches of 128: grey at 28 pixels, colour at 64.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from deepclust.corruptions import CORRUPTIONS, corrupt

TILE = 96  # pixels on the sheet
LABEL = 130
BATCH, TIMED = 128, 512


def pattern(count: int, channels: int, size: int) -> Tensor:
    """Discs on a slope of brightness, (count, channels, size, size), different in every image and channel."""
    generator = torch.Generator().manual_seed(0)
    y = torch.linspace(0, 1, size)[:, None]
    x = torch.linspace(0, 1, size)
    centre_y, centre_x, radius, shade = torch.rand((4, count, 6, channels, 1, 1), generator=generator)
    images = (0.2 + 0.5 * y * x).expand(count, channels, size, size)
    for disc in range(6):
        inside = (y - centre_y[:, disc, :1]) ** 2 + (x - centre_x[:, disc, :1]) ** 2 < (0.3 * radius[:, disc, :1]) ** 2
        images = torch.where(inside, shade[:, disc], images)
    return images


def read(folder: Path, count: int) -> Tensor:
    """Images spread over a folder, at the first one's size; grey if all of them are."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in {".png", ".jpg", ".jpeg"})
    if not files:
        raise SystemExit(f"error: expected PNG or JPEG images below {folder}, found none")
    opened = [Image.open(file) for file in files[:: max(1, len(files) // count)][:count]]
    mode = "L" if all(image.mode == "L" for image in opened) else "RGB"
    arrays = [np.atleast_3d(np.asarray(image.convert(mode).resize(opened[0].size))) for image in opened]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def sheet(images: Tensor) -> Image.Image:
    """Draw all corruptions of the images."""
    columns = 6 * len(images)
    page = Image.new("RGB", (LABEL + columns * TILE, len(CORRUPTIONS) * TILE), "white")
    draw = ImageDraw.Draw(page)
    for row, name in enumerate(CORRUPTIONS):
        draw.text((4, row * TILE + TILE // 2), name, fill="black")
        made = [images] + [
            corrupt(images, name, severity, generator=torch.Generator().manual_seed(0)) for severity in range(1, 6)
        ]
        for column in range(columns):
            image = made[column % 6][column // 6].expand(3, -1, -1).permute(1, 2, 0)
            tile = Image.fromarray((image * 255).round().byte().numpy()).resize((TILE - 2, TILE - 2), Image.NEAREST)
            page.paste(tile, (LABEL + column * TILE, row * TILE))
    return page


def milliseconds(name: str, images: Tensor) -> float:
    """Time of one corruption for 1000 images, the better of two runs."""
    seconds = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        started = time.perf_counter()
        for batch in images.split(BATCH):
            corrupt(batch, name, 5, generator=generator)
        seconds.append(time.perf_counter() - started)
    return min(seconds) * 1e6 / len(images)


def main() -> None:
    """Draw the sheet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the sheet goes, a PNG")
    parser.add_argument("--images", type=Path, help="a folder of images; without it, a pattern of discs")
    parser.add_argument("--count", type=int, default=3, help="how many images the sheet shows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = read(arguments.images, arguments.count) if arguments.images else pattern(arguments.count, 3, 64)
    sheet(images).save(arguments.out)
    small, large = pattern(TIMED, 1, 28), pattern(TIMED, 3, 64)
    print("| corruption | grey, 28 px: ms per 1000 images | colour, 64 px |\n| --- | --- | --- |")
    for name in CORRUPTIONS:
        print(f"| {name} | {milliseconds(name, small):.0f} | {milliseconds(name, large):.0f} |", flush=True)


if __name__ == "__main__":
    main()
