"""One file at several sizes, and JPEGs of which less than everything is decoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFilter, ImageOps

from deepclust.errors import DataError
from deepclust.images import decode
from deepclust.images.reading import Reading

SIDES = (64, 7, 150, 1)
BICUBIC = Image.Resampling.BICUBIC
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


@cache
def photograph(width: int, height: int) -> Image.Image:
    """Clouds of several sizes, edges and a little noise, as in a photograph of this size."""
    rng = np.random.default_rng(0)
    levels = np.zeros((height, width, 3))
    for cell in (4, 16, 64, 256):
        coarse = rng.normal(size=(height // cell + 2, width // cell + 2, 3)) * 4 * cell**0.4 + 128
        clouds = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height), BICUBIC)
        levels += np.asarray(clouds, float) - 128
    y, x = np.mgrid[:height, :width]
    for _ in range(12):
        angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.4, 0.4) * width
        beyond = (x - width / 2) * np.cos(angle) + (y - height / 2) * np.sin(angle) > offset
        levels += beyond[..., None] * rng.normal(0, 25, 3)
    levels += 128 + rng.normal(0, 2, levels.shape)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))


def full(path: Path, side: int, channels: int, resize: str) -> np.ndarray:
    """All pixels decoded and turned, then reduced by Pillow: (side, side, channels)."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB").convert("L" if channels == 1 else "RGB")
    if resize == "crop":
        image = ImageOps.fit(image, (side, side), BICUBIC)
    elif resize == "stretch":
        image = image.resize((side, side), BICUBIC)
    else:
        scale = side / max(image.size)
        size = [max(1, round(length * scale)) for length in image.size]
        whole = Image.new(image.mode, (side, side))
        whole.paste(image.resize(size, BICUBIC), [(side - length) // 2 for length in size])
        image = whole
    return np.asarray(image).reshape(side, side, channels).astype(int)


def _mpo(image: Image.Image, path: Path) -> None:
    image.save(path, "MPO", save_all=True, append_images=[ImageOps.invert(image)])


def _palette(image: Image.Image, path: Path) -> None:
    image.quantize(64).save(path, "PNG", transparency=3)


def _deep(image: Image.Image, path: Path) -> None:
    tifffile.imwrite(path, np.asarray(image).astype(np.uint16) * 257, photometric="rgb")


def _saved(format_: str, mode: str = "RGB", **options: Any) -> Callable[[Image.Image, Path], None]:
    return lambda image, path: image.convert(mode).save(path, format_, **options)


JPEGS = {
    "4:2:0": _saved("JPEG", quality=90, subsampling="4:2:0"),
    "4:4:4": _saved("JPEG", quality=95, subsampling="4:4:4"),
    "progressive": _saved("JPEG", quality=90, progressive=True),
    "grey": _saved("JPEG", "L", quality=90),
    "RGB": _saved("JPEG", quality=90, keep_rgb=True),
    "CMYK": _saved("JPEG", "CMYK", quality=90),
    "rotated": _saved("JPEG", quality=90, exif=ROTATED),
    "MPO": _mpo,
}
OTHERS = {
    "PNG": _saved("PNG"),
    "rotated PNG": _saved("PNG", exif=ROTATED),
    "transparent": _palette,
    "deep TIFF": _deep,
    "WebP": _saved("WEBP"),
}


def read(path: Path, sides: tuple[int, ...], channels: int = 3, **options: Any) -> list[np.ndarray]:
    reading = Reading(**{"white": {"uint16": (0, 65535)}, **options})
    return decode.read_images(path, reading, image_sizes=sides, channels=channels, max_pixels=10**7)


@pytest.mark.parametrize("kind", [*JPEGS, *OTHERS])
def test_an_image_of_several_sizes_is_each_as_if_it_were_read_alone(tmp_path: Path, kind: str) -> None:
    (JPEGS | OTHERS)[kind](photograph(331, 203), tmp_path / "a")
    for resize in ("crop", "pad", "stretch"):
        for channels in (1, 3):
            together = read(tmp_path / "a", SIDES, channels, resize=resize)
            assert [image.shape for image in together] == [(side, side, channels) for side in SIDES]
            for side, image in zip(SIDES, together, strict=True):
                (alone,) = read(tmp_path / "a", (side,), channels, resize=resize)
                assert np.array_equal(image, alone), (resize, channels, side)
    assert read(tmp_path / "a", ()) == []


@pytest.mark.parametrize(
    ("kind", "decoded"),
    [("PNG", [(1000, 800)]), ("4:2:0", [(500, 400), (1000, 800), (250, 200), (125, 100)])],
)
def test_a_file_is_opened_once_and_decoded_once_or_a_jpeg_as_small_as_each_size_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, decoded: list[tuple[int, int]]
) -> None:
    (JPEGS | OTHERS)[kind](photograph(1000, 800), tmp_path / "a")
    opened, plain = [], []
    open_, plain_ = Path.open, decode._plain
    monkeypatch.setattr(Path, "open", lambda path, *mode: opened.append(path) or open_(path, *mode))
    monkeypatch.setattr(decode, "_plain", lambda image, reading: plain.append(image.size) or plain_(image, reading))
    read(tmp_path / "a", (224, 300, 64, 57))
    assert (opened, plain) == ([tmp_path / "a"], decoded)


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_what_is_decoded_smaller_is_under_one_level_from_a_full_decode_on_average(tmp_path: Path, resize: str) -> None:
    sides = (224, 100, 57, 16)
    # 1001 x 805 is no multiple of 8: the last column and row of a reduced image hold less than the others.
    for kind, size in {"4:2:0": (1001, 805), "rotated": (805, 1001), "RGB": (1001, 805), "CMYK": (1001, 805)}.items():
        JPEGS[kind](photograph(*size), tmp_path / "a")
        for channels in (1, 3):
            found = read(tmp_path / "a", sides, channels, resize=resize)
            for side, image in zip(sides, found, strict=True):
                difference = np.abs(image - full(tmp_path / "a", side, channels, resize)).mean()
                assert difference < 1, (kind, channels, side)


def test_a_band_of_a_jpeg_is_its_red_and_not_its_luminance(tmp_path: Path) -> None:
    JPEGS["4:2:0"](photograph(331, 203), tmp_path / "a")
    for side, image in zip(SIDES, read(tmp_path / "a", SIDES, 1, bands=(0,)), strict=True):
        assert np.abs(image[..., 0] - full(tmp_path / "a", side, 3, "crop")[..., 0]).mean() <= 1


def test_of_a_jpeg_that_is_smaller_than_the_size_all_is_decoded_and_enlarged(tmp_path: Path) -> None:
    JPEGS["4:2:0"](photograph(90, 70), tmp_path / "a")
    for resize in ("crop", "pad", "stretch"):
        for side, image in zip((64, 150), read(tmp_path / "a", (64, 150), resize=resize), strict=True):
            assert np.array_equal(image, full(tmp_path / "a", side, 3, resize))


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (4000, 9), (17, 4001)])
def test_the_longest_and_thinnest_images_are_read_at_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    sides = (1, 2, 33, 300)
    for kind in ("4:2:0", "PNG"):
        (JPEGS | OTHERS)[kind](Image.linear_gradient("L").resize(size).convert("RGB"), tmp_path / "a")
        for resize in ("crop", "pad", "stretch"):
            for side, image in zip(sides, read(tmp_path / "a", sides, resize=resize), strict=True):
                assert np.abs(image - full(tmp_path / "a", side, 3, resize)).mean() <= 1, (kind, resize, side)


def test_grey_files_are_three_equal_channels_at_every_size(tmp_path: Path) -> None:
    for kind in (JPEGS["grey"], _saved("PNG", "L")):
        kind(photograph(331, 203), tmp_path / "a")
        for grey, colour in zip(read(tmp_path / "a", SIDES, 1), read(tmp_path / "a", SIDES, 3), strict=True):
            assert np.array_equal(colour, np.repeat(grey, 3, axis=2))


def test_an_opaque_image_with_an_alpha_channel_is_what_it_is_without_one(tmp_path: Path) -> None:
    image = photograph(120, 90)
    image.save(tmp_path / "a.png")
    image.convert("RGBA").save(tmp_path / "b.png")
    for one, other in zip(read(tmp_path / "a.png", SIDES), read(tmp_path / "b.png", SIDES), strict=True):
        assert np.array_equal(one, other)


def test_a_photograph_that_is_cut_off_is_refused_at_every_size(tmp_path: Path) -> None:
    JPEGS["4:2:0"](photograph(331, 203), tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-4000])
    for sides in ((7,), (150, 7)):
        with pytest.raises(DataError, match="truncated"):
            read(tmp_path / "a", sides)
