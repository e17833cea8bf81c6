"""One image file to pixels."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import tifffile
from PIL import Image

from deepclust.errors import DataError
from deepclust.images import depth, formats
from deepclust.images.decode import inspect, read_image
from deepclust.images.reading import Reading, square

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)


def read(path: Path, channels: int = 3, size: int = 6, resize: str = "crop", max_pixels: int = 10_000) -> np.ndarray:
    seen = inspect(path, Reading(), max_pixels=max_pixels)
    reading = Reading(resize=resize, white=depth.settle([seen.measured] if seen.measured else [], "file"))
    return read_image(path, reading, image_size=size, channels=channels, max_pixels=max_pixels)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def test_images_of_the_right_size_are_unchanged_and_grey_is_three_equal_channels_or_one(tmp_path: Path) -> None:
    assert np.array_equal(read(save(tmp_path / "a.png", RGB)), RGB)
    assert np.abs(read(tmp_path / "a.png", channels=1)[..., 0] - RGB @ np.array([0.299, 0.587, 0.114])).max() <= 1
    save(tmp_path / "a.png", RGB[..., 0])
    assert np.array_equal(read(tmp_path / "a.png"), np.repeat(RGB[..., :1], 3, axis=2))
    assert np.array_equal(read(tmp_path / "a.png", channels=1), RGB[..., :1])


@pytest.mark.parametrize("kind", ["LA", "palette"])
def test_transparent_pixels_become_black_and_opaque_ones_keep_their_colour(tmp_path: Path, kind: str) -> None:
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


def test_grey_of_1_16_and_32_bits_keeps_its_brightness(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 32768], [40000, 65278, 65535], [1, 2, 60000]], np.uint16)
    floats = np.linspace(0, 1, 9, dtype=np.float32).reshape(3, 3)
    for name, values, expected in [
        ("a.png", np.eye(3, dtype=bool), np.eye(3) * 255),
        ("b.png", deep, np.rint(deep / 257)),
        ("c.tiff", floats, np.rint(floats * 255)),
    ]:
        assert np.array_equal(read(save(tmp_path / name, values), channels=1, size=3)[..., 0], expected)


def test_cmyk_is_read_as_the_colour_it_prints(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = read(tmp_path / "a.jpg", size=16)[8, 8].tolist()
    assert (red > 240, green < 15, blue < 15) == (True, True, True)


# From the EXIF standard, and TIFF's: where the stored image's row 0 and column 0 are to be seen.
UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])  # of which Pillow turns TIFF by itself
def test_exif_rotation_is_applied_once_and_damaged_exif_does_not_lose_the_image(tmp_path: Path, name: str) -> None:
    for orientation, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(read(save(tmp_path / name, RGB, exif=exif)), upright(RGB)), orientation
    save(tmp_path / "b.png", RGB, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7fgarbage")
    assert np.array_equal(read(tmp_path / "b.png"), RGB)


@pytest.mark.parametrize("size", [(31, 64), (333, 97), (1, 9)])
def test_a_crop_is_the_centre_square_resized_by_pillow(size: tuple[int, int]) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8))
    left, top = max(0, image.width - image.height) / 2, max(0, image.height - image.width) / 2
    box = (left, top, image.width - left, image.height - top)
    for side in (17, 32, 65):
        expected = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box))
        assert np.array_equal(square(image, image_size=side, channels=3, resize="crop"), expected)


def test_pad_keeps_all_of_the_image_on_black_and_stretch_fills_the_square(tmp_path: Path) -> None:
    wide = np.repeat(np.array([[10] * 2 + [100] * 4 + [200] * 2], np.uint8), 4, axis=0)
    path = save(tmp_path / "a.png", wide)
    padded = read(path, 1, 8, "pad")[..., 0]
    assert np.array_equal(padded[2:6], wide)
    assert not padded[[0, 1, 6, 7]].any()
    assert np.array_equal(read(path, 1, 8, "stretch")[..., 0], np.repeat(wide, 2, axis=0))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff"])
def test_a_truncated_file_is_refused_in_one_line_without_its_path(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_image_is_refused_whatever_it_is_called_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="not an image that can be read"):
        read(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(DataError, match="not a regular file"):
        read(tmp_path / "b.png")


def test_images_beyond_max_pixels_are_refused_from_their_header(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RGB)
    with pytest.raises(DataError, match=r"6 x 6 pixels, more than data\.max_pixels \(35\)"):
        read(path, max_pixels=35)
    # A PNG that claims 100,000 x 100,000 pixels and has none: decoding it would fail with another reason.
    content = bytearray(path.read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    for refused in (lambda: read(path), lambda: inspect(path, Reading(), max_pixels=10_000)):
        with pytest.raises(DataError, match="max_pixels"):
            refused()


@pytest.mark.parametrize("format_", ["AVIF", "JPEG2000", "HEIF"])
def test_newer_formats_are_read_upright_as_they_were_encoded(tmp_path: Path, format_: str) -> None:
    pillow_heif.register_heif_opener()
    ramp = np.arange(24, dtype=np.uint8) * 10
    values = np.stack([np.tile(ramp, (16, 1)), np.tile(ramp[:16, None], (1, 24)), np.full((16, 24), 90)], -1).astype(
        np.uint8
    )
    lossless: dict[str, dict[str, object]] = {
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
        "JPEG2000": {"irreversible": False},
        "HEIF": {"quality": -1, "chroma": 444, "matrix_coefficients": 0},
    }
    path = tmp_path / "a.png"  # a wrong suffix
    Image.fromarray(values).save(path, format_, **lossless[format_])
    far = 0 if format_ != "AVIF" else 3  # whose colours Pillow writes as YCbCr
    assert np.abs(read(path, resize="stretch", size=24)[:, :, 2].astype(int) - 90).max() <= far
    assert np.abs(read(path, size=16).astype(int) - values[:, 4:20]).max() <= far
    assert np.abs(read(path, size=16, channels=1)[..., 0] - values[:, 4:20] @ [0.299, 0.587, 0.114]).max() <= far + 1
    if format_ != "JPEG2000":  # which has no orientation
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(values).save(path, format_, exif=exif.tobytes(), **lossless[format_])
        assert np.abs(read(path, size=16).astype(int) - UPRIGHT[6](values)[4:20]).max() <= far


def test_content_says_what_a_file_is_and_what_can_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient = np.add.outer(np.arange(6), np.arange(6)).astype(np.uint8) * 20
    (tmp_path / "a.png").write_bytes(imagecodecs.jpegxl_encode(gradient, lossless=True))
    assert np.array_equal(read(tmp_path / "a.png", channels=1)[..., 0], gradient)
    for content, reason in [
        (b"8BPS\0\1", "Photoshop: convert it to PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n", "EPS: draw it as PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC: install deepclust[heic], or convert it to JPEG"),
        (b"words\n", "not an image that can be read"),
    ]:
        monkeypatch.setattr(formats, "_is_installed", lambda module: module == "PIL")
        (tmp_path / "b.jpg").write_bytes(content)
        with pytest.raises(DataError) as caught:
            read(tmp_path / "b.jpg")
        assert str(caught.value) == reason


@pytest.mark.parametrize(
    "options",
    [
        {"photometric": "rgb", "extratags": [(50706, 1, 4, (1, 4, 0, 0), True)]},  # a DNG's version
        {"photometric": "rgb", "subfiletype": 1, "subifds": 1},  # a preview, as in NEF and ARW
    ],
)
def test_a_camera_raw_is_not_read_as_its_preview_whatever_it_is_called(
    tmp_path: Path, options: dict[str, object]
) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(RGB, **options)
        if "subifds" in options:
            writer.write(np.zeros((60, 60), np.uint16), photometric="cfa", subfiletype=0)
    with pytest.raises(DataError, match=r"^camera raw: develop it to TIFF or JPEG$"):
        read(tmp_path / "a.tif")
