"""DICOM files, written with pydicom, to the values that the standard gives them (PS3.3, C.11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG2MPML,
    CTImageStorage,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    RLELossless,
    generate_uid,
)

from deepclust.errors import DataError
from deepclust.images import depth
from deepclust.images.readers import dicom

RNG = np.random.default_rng(0)
STORED = RNG.integers(0, 4096, (5, 7), dtype=np.uint16)


def write(path: Path, pixels: np.ndarray, *, bits: int = 12, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> Path:
    """A file of (H, W), (H, W, 3) or, with NumberOfFrames, (N, H, W)."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax
    found = pydicom.Dataset()
    found.file_meta = meta
    found.SOPClassUID, found.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    found.Modality = "CT"
    colour = pixels.ndim == 3 and "NumberOfFrames" not in tags
    found.Rows, found.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    found.SamplesPerPixel, found.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        found.PlanarConfiguration = 0
    found.BitsAllocated, found.BitsStored, found.HighBit = 8 * pixels.itemsize, bits, bits - 1
    found.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(found, name, value)
    content = pixels.tobytes()
    if syntax == RLELossless:
        found.PixelData = content
        found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        found.compress(RLELossless)
    elif syntax == JPEGExtended12Bit:
        found.PixelData = encapsulate([imagecodecs.jpeg8_encode(pixels, bitspersample=12)])
    elif syntax in (HTJ2KLossless, MPEG2MPML):
        found.PixelData = encapsulate([content])
    else:
        found.PixelData = content
    found.save_as(path, enforce_file_format=True)
    return path


def read(path: Path, pages: str | int = "first", bands: tuple[int, ...] = (), max_pixels: int = 1000) -> depth.Raw:
    with path.open("rb") as file:
        return dicom.read(file, pages=pages, bands=bands, max_pixels=max_pixels)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
def test_stored_values_keep_the_bits_that_the_file_states(tmp_path: Path, syntax: str) -> None:
    found = read(write(tmp_path / "a", STORED, syntax=syntax))
    assert np.array_equal(found.values, STORED)
    assert (found.depth, found.stated, found.inverted) == ("uint12", (0, 4095), False)
    bright = read(write(tmp_path / "b", STORED, syntax=syntax, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(depth.to_8_bits(bright, {"uint12": (0, 4095)}), 255 - np.rint(STORED / 4095 * 255))


def test_rescaled_values_are_in_units_and_black_may_be_negative(tmp_path: Path) -> None:
    signed = (STORED.astype(np.int16) - 2048).astype(np.int16)
    found = read(write(tmp_path / "a", signed, RescaleSlope=2, RescaleIntercept=-1024, RescaleType="HU"))
    assert np.array_equal(found.values, signed.astype(int) * 2 - 1024)
    assert (found.depth, found.stated) == ("int HU", (-5120, 3070))
    black, white = depth.settle([depth.measure(found)], "auto")["int HU"]
    assert black <= found.values.min() < found.values.max() <= white
    fractions = read(write(tmp_path / "b", STORED, RescaleSlope=0.25, RescaleIntercept=-1, Modality="PT"))
    assert fractions.depth == "float PT"
    assert np.array_equal(fractions.values, STORED * 0.25 - 1)


def test_padding_outside_of_the_picture_is_black_and_widens_no_range(tmp_path: Path) -> None:
    signed = STORED.astype(np.int16)
    signed[:2] = -32768
    for kind, edge in (("MONOCHROME2", signed[2:].min()), ("MONOCHROME1", signed[2:].max())):
        found = read(write(tmp_path / "a", signed, bits=16, PixelPaddingValue=-32768, PhotometricInterpretation=kind))
        assert (found.values[:2] == edge).all(), kind
        assert np.array_equal(found.values[2:], signed[2:])


def window(units: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3, C.11.2.1.2.1, pixel by pixel, from 0 to 255."""

    def level(x: float) -> float:
        if x <= centre - 0.5 - (width - 1) / 2:
            return 0
        if x > centre - 0.5 + (width - 1) / 2:
            return 255
        return ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255

    return np.rint(np.vectorize(level, otypes=[float])(units))


@pytest.mark.parametrize("slope", [1, -1])
def test_the_first_window_makes_grey_levels_as_a_viewer_does(tmp_path: Path, slope: int) -> None:
    tags = {"RescaleSlope": slope, "RescaleIntercept": -1024, "WindowCenter": [40, 500], "WindowWidth": [400, 1500]}
    expected = window(slope * STORED.astype(float) - 1024, 40, 400)
    found = read(write(tmp_path / "a", STORED, **tags))
    assert (found.depth, found.is_deep) == ("8 bits through a window", False)
    assert np.array_equal(depth.to_8_bits(found, {}), expected)
    inverted = read(write(tmp_path / "b", STORED, PhotometricInterpretation="MONOCHROME1", **tags))
    assert np.array_equal(depth.to_8_bits(inverted, {}), 255 - expected)


def test_a_table_of_grey_levels_comes_before_a_window(tmp_path: Path) -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor = [4096, 0, 12]
    levels = np.sqrt(np.arange(4096) * 4095).astype(np.uint16)
    table.LUTData = levels.tolist()
    table["LUTData"].VR = "US"
    path = write(tmp_path / "a", STORED, VOILUTSequence=[table], WindowCenter=5, WindowWidth=5)
    assert np.array_equal(read(path).values, np.rint(levels[STORED] / 4095 * 255))


def test_colour_is_rgb_whether_stored_so_in_planes_or_by_a_palette(tmp_path: Path) -> None:
    rgb = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    found = read(write(tmp_path / "a", rgb, bits=8))
    assert np.array_equal(found.values, rgb)
    assert not found.is_deep
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1)).reshape(rgb.shape)
    assert np.array_equal(read(write(tmp_path / "b", planes, bits=8, PlanarConfiguration=1)).values, rgb)
    assert np.array_equal(read(tmp_path / "b", bands=(1,)).values, rgb[..., 1])
    palette = RNG.integers(0, 256, (3, 256), dtype=np.uint8)
    index = RNG.integers(0, 256, (4, 6), dtype=np.uint8)
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, colours in zip(("Red", "Green", "Blue"), palette, strict=True):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        tags[f"{name}PaletteColorLookupTableData"] = colours.tobytes()
    assert np.array_equal(read(write(tmp_path / "c", index, bits=8, **tags)).values, palette.T[index])


def test_frames_are_pages_each_with_its_own_rescale(tmp_path: Path) -> None:
    frames = RNG.integers(0, 4096, (3, 5, 7), dtype=np.uint16)
    groups = []
    for intercept in (0, 100, 200):
        item, group = pydicom.Dataset(), pydicom.Dataset()
        item.RescaleSlope, item.RescaleIntercept, item.RescaleType = 2, intercept, "HU"
        group.PixelValueTransformationSequence = [item]
        groups.append(group)
    path = write(tmp_path / "a", frames, NumberOfFrames=3, PerFrameFunctionalGroupsSequence=groups)
    units = frames.astype(int) * 2 + np.array([0, 100, 200])[:, None, None]
    for pages, expected in {
        "first": units[0],
        "middle": units[1],
        2: units[2],
        "max": units.max(0),
        "mean": units.mean(0),
    }.items():
        assert np.allclose(read(path, pages).values, expected), pages
    with pytest.raises(DataError, match="no page 3"):
        read(path, 3)


@pytest.mark.parametrize(
    ("compressed", "plain"),
    [
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm"),  # lossless JPEG
    ],
)
def test_files_that_come_with_pydicom_are_the_same_compressed_without_loss_or_not(compressed: str, plain: str) -> None:
    one, other = (
        read(Path(str(get_testdata_file(name, download=False))), max_pixels=10**6) for name in (compressed, plain)
    )
    assert np.array_equal(one.values, other.values)
    assert one.depth == other.depth


def test_a_file_of_jpeg_ls_that_is_cut_off_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    content = Path(str(get_testdata_file("MR_small_jpeg_ls_lossless.dcm", download=False))).read_bytes()
    (tmp_path / "a").write_bytes(content[:-500])
    with pytest.raises(RuntimeError, match="imagecodecs: cut off"):  # as pydicom sums up
        read(tmp_path / "a", max_pixels=10**6)


def test_jpeg_of_12_bits_is_read_in_grey_and_refused_in_colour(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(0, 4096, 64, dtype=np.uint16)[None], 16, axis=0)
    found = read(write(tmp_path / "a", ramp, syntax=JPEGExtended12Bit), max_pixels=2000)
    assert found.depth == "uint12"
    assert np.abs(found.values.astype(int) - ramp).max() < 64
    with pytest.raises(RuntimeError, match="imagecodecs: 12 bits in colour"):  # as pydicom sums up
        read(write(tmp_path / "b", np.stack([ramp] * 3, axis=2), syntax=JPEGExtended12Bit), max_pixels=2000)


def test_what_can_not_be_read_is_refused_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    for reason, path, most in [
        ("compressed as High-Throughput.*gdcmconv", write(tmp_path / "a", STORED, syntax=HTJ2KLossless), 1000),
        ("compressed as MPEG2.*gdcmconv", write(tmp_path / "d", STORED, syntax=MPEG2MPML), 1000),
        ("7 x 5 pixels, more than data.max_pixels", write(tmp_path / "b", STORED), 34),
        ("without pixels, such as a report", write(tmp_path / "c", STORED, Rows=0), 1000),
    ]:
        with pytest.raises(DataError, match=reason):
            read(path, max_pixels=most)
