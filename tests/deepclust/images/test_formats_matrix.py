"""Format × depth × planes × compression × pages × orientation: each file has the pixels of the array that was written.

The truth is that array, of which page and bands are chosen and which is scaled here, in NumPy alone.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from deepclust.errors import DataError
from deepclust.images import depth
from deepclust.images.decode import inspect, read_image
from deepclust.images.reading import Reading
from tests.deepclust.images.test_decode import UPRIGHT

SIDE = 12


class Kind(NamedTuple):
    """Values as instruments have them, and which are black and white: as measured, and as the type states."""

    dtype: str
    low: float
    high: float
    auto: tuple[float, float]
    file: tuple[float, float]


KINDS = {
    kind.dtype: kind
    for kind in (
        Kind("uint8", 0, 255, (0, 255), (0, 255)),
        Kind("int8", -100, 90, (-128, 127), (-128, 127)),
        Kind("uint16", 0, 610, (0, 1023), (0, 65535)),
        Kind("int16", -900, 2000, (-1024, 2047), (-32768, 32767)),
        Kind("uint32", 3, 70_000, (0, 131_071), (0, 2**32 - 1)),
        Kind("int32", -5, 127, (-8, 127), (-(2**31), 2**31 - 1)),
        Kind("float16", 0, 0.75, (0, 1), (0, 1)),
        Kind("float32", -0.3, 3.2, (-0.5, 4), (0, 1)),
        Kind("float64", 0, 300, (0, 512), (0, 1)),
    )
}
TWELVE = Kind("uint16", 0, 4095, (0, 4095), (0, 4095))
Write = Callable[[Path, np.ndarray], Any]


class Case(NamedTuple):
    """A file.

    Attributes:
        name: Of the test.
        suffix: Of the file.
        write: Takes a path, and values (pages, bands, H, W).
        kind: Of the values.
        pages: How many.
        bands: How many.
        options: Of the reading.
        seen: From what a page stores to what it shows, both (H, W, bands).
        within: Levels that a lossy codec may be off.
        inverted: Whether white is zero.
    """

    name: str
    suffix: str
    write: Write
    kind: Kind = KINDS["uint8"]
    pages: int = 1
    bands: int = 1
    options: dict[str, Any] = {}  # noqa: RUF012
    seen: Callable[[np.ndarray], np.ndarray] = lambda picture: picture
    within: int = 1
    inverted: bool = False


def values(case: Case) -> np.ndarray:
    """(pages, bands, H, W), each band of each page with the least and greatest value at one place."""
    kind = case.kind
    drawn = np.random.default_rng(1).uniform(kind.low, kind.high, (case.pages, case.bands, SIDE, SIDE))
    drawn[..., 0, :2] = kind.low, kind.high
    return (drawn if kind.dtype.startswith("f") else np.rint(drawn)).astype(kind.dtype)


def truth(stack: np.ndarray, case: Case, white: tuple[float, float]) -> np.ndarray:
    """(H, W, 1 or 3) from 0 to 255."""
    looked_at = np.stack([case.seen(np.moveaxis(page.astype(np.float64), 0, 2)) for page in stack])
    which = case.options.get("pages", "first")
    number = {"first": 0, "middle": len(stack) // 2}.get(which, which)
    picture = {"max": looked_at.max(axis=0), "mean": looked_at.mean(axis=0)}.get(which)
    picture = looked_at[number] if picture is None else picture
    bands = case.options.get("bands") or ((0, 1, 2) if picture.shape[2] > 2 else (0,))
    levels = np.rint((picture[..., bands] - white[0]) / (white[1] - white[0]) * 255).clip(0, 255)
    return 255 - levels if case.inverted else levels


def decoded(path: Path, case: Case, white: str) -> np.ndarray:
    how = Reading(**case.options)
    seen = inspect(path, how, max_pixels=1000)
    assert (seen.width, seen.height) == (SIDE, SIDE)
    reading = how.replaced(white=depth.settle([seen.measured] if seen.measured else [], white))
    return read_image(path, reading, image_size=SIDE, channels=3, max_pixels=1000)


# Writers.


def tiff(chunky: bool = True, **options: Any) -> Write:
    """One picture: bands within each pixel, or one plane after the other."""

    def write(path: Path, stack: np.ndarray) -> None:
        page = stack[0] if stack.shape[1] > 1 else stack[0, 0]
        how: dict[str, Any] = {"photometric": "rgb" if stack.shape[1] > 2 else "minisblack"}
        if stack.shape[1] > 1:
            how["planarconfig"] = "contig" if chunky else "separate"
            page = np.moveaxis(page, 0, 2) if chunky else page
        tifffile.imwrite(path, page, **how | options)

    return write


def tiff_pages(**options: Any) -> Write:
    """Pages of one band, or of RGB."""

    def write(path: Path, stack: np.ndarray) -> None:
        pages = np.moveaxis(stack, 1, 3) if stack.shape[1] > 1 else stack[:, 0]
        how = {"photometric": "rgb" if stack.shape[1] > 1 else "minisblack"}
        tifffile.imwrite(path, pages, **how | options)

    return write


def hyperstack(order: str, **options: Any) -> Write:
    """Pages and bands as axes that the file names: P and C, in this order."""

    def write(path: Path, stack: np.ndarray) -> None:
        axes = order.replace("P", "Z")
        shaped = stack if order == "PC" else stack.swapaxes(0, 1)
        tifffile.imwrite(path, shaped, metadata={"axes": f"{axes}YX"}, photometric="minisblack", **options)

    return write


def volume(path: Path, stack: np.ndarray) -> None:
    """All pages within one of the file's, in tiles that are deep as well."""
    tifffile.imwrite(path, stack[:, 0], volumetric=True, tile=(16, 16, 16), photometric="minisblack")


def wrong_axes(path: Path, stack: np.ndarray) -> None:
    tifffile.imwrite(path, np.moveaxis(stack[0], 0, 2), metadata={"axes": "YXC"}, photometric="minisblack")


def pillow(mode: str = "", **options: Any) -> Write:
    def write(path: Path, stack: np.ndarray) -> None:
        frames = [np.moveaxis(page, 0, 2).squeeze() for page in stack]
        images = [Image.fromarray(frame, mode or None) for frame in frames]
        several = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
        images[0].save(path, **several, **options)

    return write


def palette_pages(path: Path, stack: np.ndarray) -> None:
    """The colours of each page are (v, 255 - v, 7)."""
    colours = np.stack([np.arange(256), 255 - np.arange(256), np.full(256, 7)]).astype(np.uint16) * 257
    tifffile.imwrite(path, stack[:, 0], photometric="palette", colormap=colours)


def through_palette(picture: np.ndarray) -> np.ndarray:
    return np.concatenate([picture, 255 - picture, np.full_like(picture, 7)], axis=2)


def inked(picture: np.ndarray) -> np.ndarray:
    most = 255 if picture.max() < 256 else 65535
    return (most - picture[..., :3]) * (most - picture[..., 3:]) / most


def png_16(exif: int = 1, last: bool = False) -> Write:
    """With EXIF's orientation as the first chunk after the header, or the last before the end."""

    def write(path: Path, stack: np.ndarray) -> None:
        content = imagecodecs.png_encode(np.ascontiguousarray(np.moveaxis(stack[0], 0, 2).squeeze()))
        tag = Image.Exif()
        tag[0x0112] = exif
        body = b"eXIf" + tag.tobytes().removeprefix(b"Exif\0\0")
        chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        where = len(content) - 12 if last else 33
        path.write_bytes(content[:where] + chunk + content[where:])

    return write


def pnm(kind: int, most: int) -> Write:
    def write(path: Path, stack: np.ndarray) -> None:
        rows = np.moveaxis(stack[0], 0, 2)
        header = f"P{kind} # a comment\n{SIDE} {SIDE}\n{most}\n".encode()
        text = "\n# another\n".join(" ".join(map(str, row.ravel().tolist())) for row in rows).encode()
        path.write_bytes(header + (text if kind < 4 else rows.astype(">u2").tobytes()))

    return write


def jpeg_2000(bits: int) -> Write:
    def write(path: Path, stack: np.ndarray) -> None:
        picture = np.ascontiguousarray(np.moveaxis(stack[0], 0, 2).squeeze())
        path.write_bytes(imagecodecs.jpeg2k_encode(picture, level=0, reversible=True, bitspersample=bits))

    return write


def cases() -> Iterator[Case]:
    """All files that are read."""
    u8, u16, f32 = KINDS["uint8"], KINDS["uint16"], KINDS["float32"]
    for name, kind in KINDS.items():
        yield Case(f"tiff-{name}-grey", ".tif", tiff(), kind)
        yield Case(f"tiff-{name}-chunky", ".tif", tiff(), kind, bands=3)
        yield Case(f"tiff-{name}-planar", ".tif", tiff(chunky=False), kind, bands=3)
    stored: dict[str, dict[str, Any]] = {
        "big-endian": {"byteorder": ">"},
        "bigtiff": {"bigtiff": True},
        "tiles": {"tile": (16, 16)},
        "strips": {"rowsperstrip": 5},
        "lzw": {"compression": "lzw"},
        "lzw-predictor": {"compression": "lzw", "predictor": True},
        "deflate-predictor-big-endian": {"compression": "zlib", "predictor": True, "byteorder": ">"},
        "zstd-tiles": {"compression": "zstd", "tile": (16, 16)},
        "packbits": {"compression": "packbits"},
        "lzma": {"compression": "lzma"},
        "jpeg2000": {"compression": "jpeg2000"},
    }
    yield Case("tiff-webp", ".tif", tiff(compression="webp", compressionargs={"lossless": True}), bands=3)
    for (name, how), kind in itertools.product(stored.items(), (u8, u16)):
        yield Case(f"tiff-{name}-{kind.dtype}", ".tif", tiff(**how), kind, bands=3)
    for name in ("lzw-predictor", "zstd-tiles", "big-endian"):
        yield Case(f"tiff-{name}-float32-planar", ".tif", tiff(chunky=False, **stored[name]), f32, bands=3)
    for chunky in (True, False):
        how = {"compression": "jpeg", "compressionargs": {"level": 100}, "subsampling": (1, 1), "rowsperstrip": 16}
        jpeg = tiff(chunky, **how)
        yield Case(f"tiff-jpeg-{'chunky' if chunky else 'planar'}", ".tif", jpeg, bands=3, within=12)
    for kind in (u8, u16, f32):
        yield Case(f"tiff-white-is-zero-{kind.dtype}", ".tif", tiff(photometric="miniswhite"), kind, inverted=True)
    for orientation, turn in UPRIGHT.items():
        how = {"extratags": [(274, "H", 1, orientation, True)]}
        for kind in (u8, u16):
            name = f"tiff-orientation-{orientation}-{kind.dtype}"
            yield Case(name, ".tif", tiff(**how), kind, bands=3, seen=turn)
        for last in (False, True):
            name = f"png-16-orientation-{orientation}-{'last' if last else 'first'}"
            yield Case(name, ".png", png_16(orientation, last), u16, bands=3, seen=turn)
    for which, kind in itertools.product(("first", "middle", "max", "mean", 2), (u8, u16)):
        pages = {"pages": which}
        yield Case(f"tiff-page-{which}-{kind.dtype}", ".tif", tiff_pages(), kind, 4, options=pages)
        yield Case(f"tiff-lzw-page-{which}-{kind.dtype}", ".tif", tiff_pages(compression="lzw"), kind, 4, 3, pages)
        one_header = tiff_pages(truncate=True, byteorder=">")
        yield Case(f"tiff-one-header-page-{which}-{kind.dtype}", ".tif", one_header, kind, 4, options=pages)
        yield Case(f"tiff-volume-page-{which}-{kind.dtype}", ".tif", volume, kind, 16, options=pages)
        yield Case(f"imagej-page-{which}-{kind.dtype}", ".tif", hyperstack("PC", imagej=True), kind, 4, 2, pages)
        yield Case(f"ome-page-{which}-{kind.dtype}", ".ome.tif", hyperstack("CP", ome=True), kind, 4, 3, pages)
    for which in ("first", "middle", "max", "mean", 2):
        pages = {"pages": which}
        yield Case(f"palette-page-{which}", ".tif", palette_pages, u8, 3, options=pages, seen=through_palette)
        for suffix, bands in ((".png", 3), (".webp", 3), (".gif", 1)):
            write = pillow(lossless=True) if suffix == ".webp" else pillow()
            yield Case(f"animated{suffix}-{which}", suffix, write, u8, 3, bands, pages)
    infrared: dict[str, dict[str, Any]] = {
        "unspecified": {"extrasamples": ["unspecified"]},
        "unassociated": {"extrasamples": ["unassalpha"]},
        "associated": {"extrasamples": ["assocalpha"]},
    }
    for (name, how), kind, chunky in itertools.product(infrared.items(), (u8, u16), (True, False)):
        planes = "chunky" if chunky else "planar"
        yield Case(f"tiff-infrared-{name}-{kind.dtype}-{planes}", ".tif", tiff(chunky, **how), kind, bands=4)
    for bands in ((3,), (3, 1, 0)):
        yield Case(f"tiff-bands-{bands}", ".tif", tiff(), u16, bands=4, options={"bands": bands})
        yield Case(f"imagej-bands-{bands}", ".tif", hyperstack("PC", imagej=True), u16, 2, 4, {"bands": bands})
    for suffix in (".png", ".tif", ".bmp"):
        yield Case(f"green-of{suffix}", suffix, pillow(), u8, bands=3, options={"bands": (1,)})
    grey_and_more = tiff(extrasamples=["unassalpha"])
    yield Case("tiff-grey-with-alpha", ".tif", grey_and_more, u8, bands=2)
    yield Case("tiff-grey-with-alpha-16", ".tif", grey_and_more, u16, bands=2)
    yield Case("tiff-five-bands", ".tif", tiff(chunky=False, photometric="minisblack"), u16, bands=5)
    full = u16._replace(high=65535, auto=(0, 65535))
    for kind, chunky in itertools.product((u8, full), (True, False)):
        name = f"tiff-inks-{kind.dtype}-{'chunky' if chunky else 'planar'}"
        yield Case(name, ".tif", tiff(chunky, photometric="separated"), kind, bands=4, seen=inked)
    for bands in (1, 3):
        yield Case(f"png-16-{bands}", ".png", png_16(), u16, bands=bands)
        yield Case(f"png-16-full-{bands}", ".png", png_16(), full, bands=bands)
    twelve = {"bitspersample": 12}
    yield Case("tiff-states-12", ".tif", tiff(**twelve), TWELVE)
    yield Case("tiff-states-12-colour", ".tif", tiff(**twelve), TWELVE, bands=3)
    nibbles = Kind("uint8", 0, 15, (0, 15), (0, 15))
    yield Case("tiff-states-4", ".tif", tiff(bitspersample=4), nibbles)
    yield Case("tiff-states-4-colour", ".tif", tiff(bitspersample=4), nibbles, bands=3)
    for kind, bands in ((2, 1), (3, 3), (5, 1), (6, 3)):
        yield Case(f"pnm-12-P{kind}", ".pnm", pnm(kind, 4095), TWELVE, bands=bands)
        thousand = Kind("uint16", 0, 1000, (0, 1023), (0, 1000))
        yield Case(f"pnm-1000-P{kind}", ".pnm", pnm(kind, 1000), thousand, bands=bands)
    yield Case("pfm", ".pfm", pillow(), f32)
    for bits, bands in itertools.product((8, 12, 16), (1, 3, 4)):
        kind = {8: u8, 12: TWELVE, 16: u16}[bits]
        yield Case(f"jpeg2000-{bits}-{bands}", ".jp2", jpeg_2000(bits), kind, bands=bands)
    for suffix in (".png", ".bmp", ".ppm", ".webp", ".tif", ".jp2"):
        write = pillow(lossless=True) if suffix == ".webp" else pillow()
        yield Case(f"pillow{suffix}-rgb", suffix, write, u8, bands=3)
        if suffix != ".webp":
            yield Case(f"pillow{suffix}-grey", suffix, write, u8)
    yield Case("avif", ".avif", pillow(quality=100, subsampling="4:4:4"), u8, bands=3, within=12)


ALL = list(cases())


@pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])
def test_a_file_has_the_pixels_of_the_array_that_was_written(case: Case, tmp_path: Path) -> None:
    path = tmp_path / f"a{case.suffix}"
    stack = values(case)
    case.write(path, stack)
    for white in ("auto", "file"):
        expected = truth(stack, case, getattr(case.kind, white))
        found = decoded(path, case, white).astype(int)
        assert np.abs(found - expected).max() <= case.within, white


REFUSED = {
    "complex": (tiff(), Kind("complex64", 0, 1, (0, 1), (0, 1)), 1, {}, "SampleFormat"),
    "no such page": (tiff_pages(), KINDS["uint16"], 1, {"pages": 1}, "no page 1"),
    "no such frame": (pillow(), KINDS["uint8"], 1, {"pages": 1}, "no page 1"),
    "no such page of 16 bits": (png_16(), KINDS["uint16"], 1, {"pages": 1}, "no page 1"),
    "no such band": (tiff(), KINDS["uint16"], 3, {"bands": (3,)}, "no band 3"),
    "no such colour": (pillow(), KINDS["uint8"], 1, {"bands": (0, 1, 2)}, "no band 2"),
    "lab of 16 bits": (tiff(photometric="cielab"), KINDS["uint16"], 3, {}, "CIELAB"),
    "pixels of a camera's raw file": (tiff(photometric="cfa"), KINDS["uint16"], 1, {}, "camera raw"),
    "axes the wrong way round": (wrong_axes, KINDS["uint16"], 3, {}, "Y and X"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    write, kind, bands, options, reason = REFUSED[name]
    case = Case(name, ".tif", write, kind, bands=bands, options=options)
    write(tmp_path / "a.tif", values(case))
    with pytest.raises(DataError, match=reason) as caught:
        decoded(tmp_path / "a.tif", case, "auto")
    assert "\n" not in str(caught.value)
