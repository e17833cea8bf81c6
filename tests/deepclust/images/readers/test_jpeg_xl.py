"""JPEG XL against what was encoded, without loss."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageOps

from deepclust.errors import DataError
from deepclust.images import depth
from deepclust.images.readers import jpeg_xl

RNG = np.random.default_rng(0)


def encoded(values: np.ndarray, **options: Any) -> bytes:
    content: bytes = imagecodecs.jpegxl_encode(values, lossless=True, **options)
    return content


def read(tmp_path: Path, content: bytes, pages: str | int = "first", bands: tuple[int, ...] = ()) -> depth.Raw:
    (tmp_path / "a.jxl").write_bytes(content)
    with (tmp_path / "a.jxl").open("rb") as file:
        return jpeg_xl.read(file, pages=pages, bands=bands, max_pixels=10_000)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_values_bits_and_transparency_are_those_that_were_encoded(tmp_path: Path, bits: int, bands: int) -> None:
    values = RNG.integers(0, 2**bits, (5, 8, bands), dtype=np.uint8 if bits == 8 else np.uint16)
    values = values[..., 0] if bands == 1 else values
    found = read(tmp_path, encoded(values, bitspersample=bits))
    assert (found.depth, found.stated[1]) == (f"uint{bits}" if bits > 8 else "8 bits", 2**bits - 1)
    if bands in (2, 4):
        assert found.alpha is not None
        assert np.array_equal(found.alpha, np.rint(values[..., -1] / (2**bits - 1) * 255))
        values = values[..., :-1].squeeze()
    assert np.array_equal(found.values, values)


def test_floats_are_read_as_they_are_and_one_band_of_colour_if_asked_for(tmp_path: Path) -> None:
    values = RNG.random((4, 6)).astype(np.float32)
    found = read(tmp_path, encoded(values))
    assert np.array_equal(found.values, values)
    assert found.depth == "float32"
    rgb = RNG.integers(0, 256, (5, 8, 3), dtype=np.uint8)
    assert np.array_equal(read(tmp_path, encoded(rgb), bands=(2,)).values, rgb[..., 2])


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (24, 16), (40, 30), (257, 19), (16, 9), (333, 30), (256, 256)])
def test_the_header_says_size_and_frames_as_the_decoder_does(size: tuple[int, int]) -> None:
    for shape in (size, (*size, 3), (3, *size, 3)):
        found = jpeg_xl.header(encoded(np.zeros(shape, np.uint8)))
        assert (found.height, found.width, found.is_animated) == (*size, len(shape) == 4)


def test_a_picture_is_upright_and_a_frame_chosen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = io.BytesIO()
    Image.fromarray(np.add.outer(5 * np.arange(16), np.arange(24)).astype(np.uint8)).save(jpeg, "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(jpeg))
    found = read(tmp_path, imagecodecs.jpegxl_encode_jpeg(jpeg.getvalue()))
    assert found.values.shape == (24, 16)
    assert np.abs(found.values.astype(int) - np.asarray(upright)).max() <= 2  # two decoders of one JPEG
    frames = RNG.integers(0, 256, (3, 5, 8, 3), dtype=np.uint8)
    assert np.array_equal(read(tmp_path, encoded(frames)).values, frames[0])
    assert np.array_equal(read(tmp_path, encoded(frames), 2).values, frames[2])
    with pytest.raises(DataError, match=r"an animation in JPEG XL, of which data\.pages can not be mean"):
        read(tmp_path, encoded(frames), "mean")


def test_what_can_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"200 x 51 pixels, more than data\.max_pixels"):
        read(tmp_path, encoded(np.zeros((51, 200), np.uint8)))
    with pytest.raises(DataError, match="no page 1"):
        read(tmp_path, encoded(np.zeros((5, 5), np.uint8)), 1)
    with pytest.raises(DataError, match="without a picture"):
        read(tmp_path, b"\0\0\0\x0cJXL \r\n\x87\n")
