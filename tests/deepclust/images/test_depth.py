"""Deep pixels, transparency and stacks, on what cameras, microscopes and scanners write."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from deepclust.errors import DataError
from deepclust.images import depth
from deepclust.images.decode import inspect, read_image
from deepclust.images.reading import Reading

SIDE = 16
RNG = np.random.default_rng(0)


def settled(paths: list[Path], white: depth.White = "auto", **options: object) -> Reading:
    """How these images are read together."""
    how = Reading(**options)
    seen = [inspect(path, how, max_pixels=1000).measured for path in paths]
    return how.replaced(white=depth.settle([one for one in seen if one], white))


def read(path: Path, reading: Reading, channels: int = 1) -> np.ndarray:
    return read_image(path, reading, image_size=SIDE, channels=channels, max_pixels=1000)


def frames(folder: Path, values: np.ndarray) -> list[Path]:
    paths = [folder / f"{index:02}.tif" for index in range(len(values))]
    for path, value in zip(paths, values, strict=True):
        tifffile.imwrite(path, value)
    return paths


def camera(count: int) -> np.ndarray:
    """Frames of a scientific camera: 100 is its offset, and few photons come."""
    values = RNG.integers(100, 500, (count, SIDE, SIDE)).astype(np.uint16)
    values[0, 0, 0] = 610
    return values


def test_a_cameras_frames_keep_their_levels_and_their_brightness_to_each_other(tmp_path: Path) -> None:
    values = camera(12)
    paths = frames(tmp_path, values)
    reading = settled(paths)
    assert reading.white == {"uint16": (0, 1023)}
    found = np.stack([read(path, reading)[..., 0] for path in paths])
    assert np.array_equal(found, np.rint(values / 1023 * 255))


def test_a_hot_pixel_or_a_mark_that_leaves_the_other_images_few_levels_is_warned_of(tmp_path: Path) -> None:
    def warnings(values: np.ndarray) -> list[str]:
        seen = [inspect(path, Reading(), max_pixels=1000).measured for path in frames(tmp_path, values)]
        measured = [one for one in seen if one]
        return depth.few_levels(measured, depth.settle(measured, "auto"))

    values = camera(5)
    assert not warnings(values)
    values[3, 2, 2] = 65535
    assert len(found := warnings(values)) == 1
    assert found[0].startswith(
        "4 of 5 images of uint16 pixels get fewer than 16 of 256 grey levels, as 0 is black and "
    )
    assert not warnings(np.linspace(0, 4000, 5 * SIDE * SIDE).reshape(5, SIDE, SIDE).astype(np.uint16))
    values = RNG.random((5, SIDE, SIDE)).astype(np.float32)
    values[0, 0, 0] = -9999  # of a map, where there is no value
    assert "4 of 5 images of float32 pixels" in warnings(values)[0]


def test_a_further_image_changes_the_scale_only_if_it_needs_a_bit_more(tmp_path: Path) -> None:
    values = np.concatenate([camera(3), np.full((3, SIDE, SIDE), 1023, np.uint16)])
    paths = frames(tmp_path, values)
    assert settled(paths[:3]).white == settled(paths).white == {"uint16": (0, 1023)}
    tifffile.imwrite(paths[5], np.full((SIDE, SIDE), 1024, np.uint16))
    assert settled(paths).white == {"uint16": (0, 2047)}
    assert read(paths[5], settled(paths[:5])).min() == 255  # later, when the scale is settled


@pytest.mark.parametrize("channels", [1, 3])
def test_12_bits_in_a_png_of_16_keep_all_the_levels_that_8_bits_have(channels: int, tmp_path: Path) -> None:
    ramp = np.linspace(0, 4095, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    values = ramp if channels == 1 else np.stack([ramp, ramp.T, ramp[::-1]], axis=2)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(np.ascontiguousarray(values)))
    found = read(tmp_path / "a.png", settled([tmp_path / "a.png"]), channels)
    assert np.array_equal(found.squeeze(), np.rint(values / 4095 * 255))
    assert len(np.unique(found)) == 256


def test_white_may_be_stated_or_the_formats_own(tmp_path: Path) -> None:
    paths = frames(tmp_path, camera(2))
    assert settled(paths, 800.0).white == {"uint16": (0, 800)}
    assert settled(paths, "file").white == {"uint16": (0, 65535)}


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (np.array([-1024, -1000, 3071], np.int16), {"int16": (-1024, 4095)}),  # computed tomography
        (np.array([-1025, 0, 0], np.int16), {"int16": (-2048, 1)}),
        (np.array([-7, -6, -5], np.int32), {"int32": (-8, 1)}),
        (np.array([0, 0, 0], np.uint16), {"uint16": (0, 1)}),
        (np.array([0, 0, 0], np.float32), {"float32": (0, 1)}),
        (np.array([0, 0.2, 1], np.float32), {"float32": (0, 1)}),
        (np.array([0, 0.2, 0.3], np.float64), {"float64": (0, 0.5)}),
        (np.array([0, 7, 255], np.float32), {"float32": (0, 256)}),
        (np.array([0, 7, 200], np.uint8), {}),
        (np.array([-100, 7, 100], np.int8), {}),
    ],
)
def test_black_is_zero_or_below_all_values_and_white_above_them(
    values: np.ndarray, scale: dict[str, tuple[float, float]], tmp_path: Path
) -> None:
    (path,) = frames(tmp_path, np.resize(values, (1, SIDE, SIDE)))
    reading = settled([path])
    assert reading.white == scale
    stated = () if scale else (np.iinfo(values.dtype).min, np.iinfo(values.dtype).max)
    black, white = next(iter(scale.values()), stated)
    expected = np.rint((values.astype(float) - black) / (white - black) * 255)
    assert read(path, reading).ravel()[:3].tolist() == expected.tolist()


@pytest.mark.parametrize("mark", [np.nan, np.inf, np.finfo(np.float32).min, np.finfo(np.float64).min])
def test_marks_of_missing_pixels_are_refused_and_do_not_scale_the_others(mark: float, tmp_path: Path) -> None:
    values = np.ones((1, SIDE, SIDE))
    values[0, 0, 0] = mark
    (path,) = frames(tmp_path, values)
    for refused in (lambda: settled([path]), lambda: read(path, Reading())):
        with pytest.raises(DataError, match="missing pixels"):
            refused()


def test_a_depth_that_no_training_image_had_is_refused(tmp_path: Path) -> None:
    (path,) = frames(tmp_path, camera(1))
    with pytest.raises(DataError, match="uint16, as those of no training image are"):
        read(path, Reading())


def test_opposite_to_white_the_maximum_of_pages_is_the_brightest(tmp_path: Path) -> None:
    stack = RNG.integers(0, 1024, (3, SIDE, SIDE)).astype(np.uint16)
    stack[:, 0, 0] = 1023
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="miniswhite")
    found = read(tmp_path / "a.tif", settled([tmp_path / "a.tif"], pages="max"))[..., 0]
    assert np.array_equal(found, 255 - np.rint(stack.min(axis=0) / 1023 * 255))


def drawing(path: Path, kind: str, light: int) -> Path:
    """A disc of one luminance on nothing: where there is nothing, the hidden colour is another."""
    y, x = np.ogrid[:SIDE, :SIDE]
    disc = ((y - 8) ** 2 + (x - 8) ** 2 < 25).astype(np.uint8)
    values = np.where(disc, light, 90).astype(np.uint8)
    if kind == "palette":
        image = Image.fromarray(disc, "P")
        image.putpalette([90, 90, 90, light, light, light])
        image.save(path, transparency=0)
    elif kind == "RGBA of 16 bits":
        pixels = np.dstack([values] * 3 + [disc * 255]).astype(np.uint16) * 257
        path.write_bytes(imagecodecs.png_encode(pixels))
    else:
        bands = [values] * (len(kind) - 1) + [disc * 255]
        Image.fromarray(np.dstack(bands), kind).save(path)
    return path


@pytest.mark.parametrize("kind", ["LA", "RGBA", "palette", "RGBA of 16 bits"])
@pytest.mark.parametrize(("light", "background"), [(0, 255), (30, 255), (120, 0), (255, 0)])
def test_a_drawing_on_transparency_stays_visible(kind: str, light: int, background: int, tmp_path: Path) -> None:
    path = drawing(tmp_path / "a.png", kind, light)
    whole = {"uint16": (0, 65535)}
    found = read(path, Reading(white=whole))[..., 0]
    assert (found[8, 8], found[0, 0]) == (light, background)
    for name, level in (("black", 0), ("white", 255)):
        stated = read(path, Reading(background=name, white=whole))[..., 0]
        assert (stated[8, 8], stated[0, 0]) == (light, level)


def test_what_is_wholly_transparent_is_black_and_half_of_it_is_half_seen(tmp_path: Path) -> None:
    pixels = np.full((SIDE, SIDE, 4), 200, np.uint8)
    for alpha, expected in ((0, 0), (128, 100)):
        pixels[..., 3] = alpha
        Image.fromarray(pixels).save(tmp_path / "a.png")
        assert np.unique(read(tmp_path / "a.png", Reading())).tolist() == [expected]


def test_an_opaque_image_is_the_same_to_the_bit_on_any_background(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 60, (SIDE, SIDE, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for background in ("auto", "black", "white"):
        assert np.array_equal(read(tmp_path / "a.png", Reading(background=background), 3), pixels[..., :3])


def test_hidden_colours_do_not_count_as_white(tmp_path: Path) -> None:
    pixels = np.full((SIDE, SIDE, 4), 65535, np.uint16)
    pixels[..., 3] = 0
    pixels[4:, 4:] = 500, 400, 300, 65535
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    assert settled([tmp_path / "a.png"]).white == {"uint16": (0, 511)}
    pixels[..., 3] = 0
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    assert settled([tmp_path / "a.png"]).white == {"uint16": (0, 1)}
    assert not read(tmp_path / "a.png", settled([tmp_path / "a.png"])).any()


@pytest.mark.parametrize("how", ["max", "mean", 30])
def test_a_stack_of_pages_is_never_in_memory_as_a_whole(how: str | int, tmp_path: Path) -> None:
    stack = np.zeros((60, 200, 200), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stack, compression="zlib")
    read_ = {"image_size": SIDE, "channels": 1, "max_pixels": 40_000}
    read_image(tmp_path / "a.tif", Reading(pages=how, white={"uint16": (0, 1)}), **read_)  # libraries are loaded
    tracemalloc.start()
    read_image(tmp_path / "a.tif", Reading(pages=how, white={"uint16": (0, 1)}), **read_)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < stack.nbytes / 3
    with pytest.raises(DataError, match="200 x 200 pixels"):
        inspect(tmp_path / "a.tif", Reading(), max_pixels=39_999)


def test_a_file_that_names_another_is_read_alone(tmp_path: Path) -> None:
    xml = """<?xml version="1.0" encoding="UTF-8"?>
    <OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:a"><Image ID="Image:0"><Pixels
    ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="16" SizeY="16" SizeC="2" SizeT="1" SizeZ="1">
    <TiffData FirstC="0" IFD="0" PlaneCount="1"><UUID FileName="a.ome.tif">urn:uuid:a</UUID></TiffData>
    <TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="../secret.tif">urn:uuid:b</UUID></TiffData>
    </Pixels></Image></OME>"""
    (tmp_path / "images").mkdir()
    for name in ("images/a.ome.tif", "secret.tif"):
        tifffile.imwrite(tmp_path / name, camera(1)[0], description=xml.replace("\n", " "), metadata=None)
    with pytest.raises(DataError, match="no band 1"):
        inspect(tmp_path / "images" / "a.ome.tif", Reading(bands=(1,)), max_pixels=1000)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
def test_a_deep_file_that_is_cut_off_is_refused(compression: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, camera(1)[0], compression=compression)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError):
        settled([path])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"P2 2 2 4095 1 2 3", "cut off: 3 of 4"),
        (b"P5 2 2 4095\n\1\2\3\4\5", "cut off: 2 of 4"),
        (b"P2 2 2 4095 1 2 3 70000", "up to 70000, more than the 4095"),
        (b"P5 2 2 4095\n\1\2\3\4\5\6\xff\xff", "up to 65535, more than the 4095"),
    ],
)
def test_values_that_are_missing_or_above_what_a_pnm_states_are_refused(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a.pgm").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        settled([tmp_path / "a.pgm"])


_PART = '<TiffData IFD="0" PlaneCount="1"/>'
_LIFETIMES = '<Value><Modulo><ModuloAlongT Type="lifetime" Start="0" End="10000000"/></Modulo></Value>'


@pytest.mark.parametrize(
    ("stated", "parts", "annotation"),
    [
        ({"Z": 10_000_000}, _PART, ""),
        ({}, '<TiffData IFD="0" PlaneCount="10000000"/>', ""),
        ({"X": 100_000, "Y": 100_000}, '<TiffData IFD="1"/>', ""),
        ({}, "<TiffData/>" * 100_000, ""),
        ({}, _PART, f'<XMLAnnotation ID="A" Namespace="dimension/modulo">{_LIFETIMES}</XMLAnnotation>'),
    ],
    ids=["size", "part", "model", "parts", "axis"],
)
def test_planes_that_an_ome_header_only_claims_cost_nothing_and_the_pages_there_are_read(
    stated: dict[str, int], parts: str, annotation: str, tmp_path: Path
) -> None:
    sizes = " ".join(f'Size{axis}="{size}"' for axis, size in ({"X": SIDE, "Y": SIDE, "Z": 3} | stated).items())
    xml = (
        '<?xml version="1.0"?><OME><StructuredAnnotations>' + annotation + "</StructuredAnnotations><Image>"
        f'<Pixels DimensionOrder="XYZCT" Type="uint16" SizeC="1" SizeT="1" {sizes}>{parts}</Pixels></Image></OME>'
    )
    values = camera(3)[::-1]  # the brightest pixel is on the last page
    tifffile.imwrite(tmp_path / "a.ome.tif", values, description=xml, metadata=None, photometric="minisblack")
    begin = time.process_time()
    tracemalloc.start()
    seen = inspect(tmp_path / "a.ome.tif", Reading(pages="max"), max_pixels=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen.measured is not None
    assert seen.measured.high == values[2].max() == 610
    assert peak < 64e6
    assert time.process_time() - begin < 4
