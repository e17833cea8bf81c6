"""One image file to pixels."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepclust.errors import DataError
from deepclust.images.decode import read_image, shorter_side

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)


def read(path: Path, channels: int = 3, size: int = 6, resize: str = "crop", max_pixels: int = 10_000) -> np.ndarray:
    return read_image(path, image_size=size, channels=channels, resize=resize, max_pixels=max_pixels)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def test_an_rgb_image_of_the_right_size_comes_back_unchanged(tmp_path: Path) -> None:
    assert np.array_equal(read(save(tmp_path / "a.png", RGB)), RGB)


def test_grey_becomes_three_equal_channels_and_comes_back_as_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RGB[..., 0])
    assert np.array_equal(read(path), np.repeat(RGB[..., :1], 3, axis=2))
    assert np.array_equal(read(path, channels=1), RGB[..., :1])


def test_colour_as_grey_is_the_weighted_sum_of_its_channels(tmp_path: Path) -> None:
    expected = RGB @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read(save(tmp_path / "a.png", RGB), channels=1)[..., 0] - expected).max() <= 1


def test_a_palette_image_has_its_palettes_colours(tmp_path: Path) -> None:
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 200, 30, 70])
    image.save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == [200, 30, 70]).all()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette"])
def test_transparent_pixels_become_black_and_opaque_ones_stay(tmp_path: Path, kind: str) -> None:
    if kind == "palette":
        image = Image.new("P", (6, 6), 1)
        image.putpalette([0, 0, 0, 90, 90, 90, 255, 255, 255])
        image.paste(2, (0, 0, 3, 6))
        image.save(tmp_path / "a.png", transparency=2)
    else:
        image = Image.new("RGBA", (6, 6), (90, 90, 90, 255))
        image.paste((255, 255, 255, 0), (0, 0, 3, 6))
        image.convert(kind).save(tmp_path / "a.png")
    pixels = read(tmp_path / "a.png")
    assert (pixels[:, :3] == 0).all()
    assert (pixels[:, 3:] == 90).all()


def test_sixteen_bits_of_grey_keep_their_brightness(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768], [40000, 65278, 65535], [1, 2, 60000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png", channels=1, size=3)[..., 0], np.rint(values / 257))


def test_floats_from_0_to_1_are_read_and_others_refused(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 9, dtype=np.float32).reshape(3, 3)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.array_equal(read(tmp_path / "a.tiff", channels=1, size=3)[..., 0], np.rint(values * 255))
    Image.fromarray(values * 7).save(tmp_path / "b.tiff")
    with pytest.raises(DataError, match="grey values outside 0 to 1"):
        read(tmp_path / "b.tiff")


def test_cmyk_is_read_as_the_colour_it_prints(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = read(tmp_path / "a.jpg", size=16)[8, 8].tolist()
    assert (red > 240, green < 15, blue < 15) == (True, True, True)


def test_black_and_white_is_read_as_0_and_255(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.eye(6, dtype=bool))
    assert np.array_equal(read(path, channels=1)[..., 0], np.eye(6) * 255)


# From the EXIF standard: where the stored image's row 0 and column 0 are to be seen.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_exif_rotation_is_applied_once(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / name, RGB, exif=exif)
    assert np.array_equal(read(path), UPRIGHT[orientation](RGB))


def test_damaged_exif_does_not_lose_the_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RGB, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7fgarbage")
    assert np.array_equal(read(path), RGB)


def wide() -> np.ndarray:
    """4 rows, 8 columns: the left quarter is 10, the middle 100, the right quarter 200."""
    return np.repeat(np.array([[10] * 2 + [100] * 4 + [200] * 2], np.uint8), 4, axis=0)


def test_crop_keeps_the_centre(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", wide())
    assert (read(path, 1, 4) == 100).all()
    shrunk = np.asarray(Image.fromarray(wide()).resize((4, 2), Image.Resampling.BICUBIC))
    assert np.array_equal(read(path, 1, 2)[..., 0], shrunk[:, 1:3])


def test_pad_keeps_all_of_the_image_on_black(tmp_path: Path) -> None:
    pixels = read(save(tmp_path / "a.png", wide()), 1, 8, "pad")[..., 0]
    assert np.array_equal(pixels[2:6], wide())
    assert not pixels[:2].any()
    assert not pixels[6:].any()


def test_stretch_fills_the_square_with_all_of_the_image(tmp_path: Path) -> None:
    pixels = read(save(tmp_path / "a.png", wide()), 1, 8, "stretch")[..., 0]
    assert np.array_equal(pixels, np.repeat(wide(), 2, axis=0))


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_one_pixel_high_images_can_be_resized(tmp_path: Path, resize: str) -> None:
    assert read(save(tmp_path / "a.png", np.full((1, 500), 9, np.uint8)), 1, 8, resize).shape == (8, 8, 1)


def test_reducing_does_not_alias(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    pixels = read(save(tmp_path / "a.png", stripes), 1, 8)
    assert np.abs(pixels.astype(int) - 128).max() <= 8


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.gif", "a.tiff", "a.webp"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / name, noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n"])
def test_what_is_no_image_is_refused_whatever_it_is_called(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match="not an image that can be read"):
        read(tmp_path / "a.png")


def test_an_absurdly_large_image_is_refused_from_its_header(tmp_path: Path) -> None:
    # A PNG that claims 100,000 x 100,000 pixels and has none: decoding it would fail with another reason.
    path = save(tmp_path / "a.png", RGB)
    content = bytearray(path.read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(DataError, match="max_pixels"):
        read(path)
    with pytest.raises(DataError, match="max_pixels"):
        shorter_side(path, max_pixels=10_000)


def test_max_pixels_itself_is_allowed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RGB)
    assert read(path, max_pixels=36).shape == (6, 6, 3)
    with pytest.raises(DataError, match=r"6 x 6 pixels, more than data\.max_pixels \(35\)"):
        read(path, max_pixels=35)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="not a regular file"):
        read(tmp_path / "a.png")
