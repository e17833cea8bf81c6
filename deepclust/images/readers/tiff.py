"""TIFFs as science writes them: many pages and bands, planes one after the other, any depth, ImageJ's and OME's axes.

The axes C and S of a file's first series are its bands; all others beside Y and X are its pages, in the file's order.
Bands beyond the colour never multiply it, tagged as transparency or not: instruments write infrared there.
"""

from __future__ import annotations

import logging
import math
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import TiffImagePlugin
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG, SAMPLEFORMAT, TiffFile

from deepclust.errors import DataError
from deepclust.images import depth, formats
from deepclust.images.readers import planes

_BYTES_A_PIXEL = 64  # of a page, at most
_OME_PLANES = 1 << 18  # that a file's header may state
_ALONE: Any = {"_multifile": False, "is_mmstack": False, "is_ndtiff": False}  # read no other files that a file names
# What Pillow reads as well, with how many samples.
_PLAIN = {
    PHOTOMETRIC.MINISWHITE: 1,
    PHOTOMETRIC.MINISBLACK: 1,
    PHOTOMETRIC.PALETTE: 1,
    PHOTOMETRIC.RGB: 3,
    PHOTOMETRIC.SEPARATED: 4,
    PHOTOMETRIC.YCBCR: 3,
    PHOTOMETRIC.CIELAB: 3,
}
_AS_THEY_ARE = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB)
_JPEG = (COMPRESSION.OJPEG, COMPRESSION.JPEG)

logging.getLogger("tifffile").disabled = True  # it tells of faults of files that it reads nevertheless


def read(file: BinaryIO, *, pages: str | int, bands: tuple[int, ...], max_pixels: int) -> depth.Raw | int:
    """Decode a TIFF, a page at a time, or leave it to Pillow: plain pictures of 8 bits or fewer.

    Args:
        file: At its start.
        pages: See `planes.page_numbers`.
        bands: See `planes.band_numbers`.
        max_pixels: Of a page.

    Returns:
        The picture, upright; or the number of its pages, all of which Pillow reads.

    Raises:
        DataError: If it is of a kind that is not read, has no such page or band, or is too large.
    """
    with TiffFile(file, **_ALONE) as tiff:
        if tiff.is_ome and not _has_sound_ome(tiff):
            tiff.is_ome = False  # its pages are read as they are
        if not tiff.series:
            raise DataError("a TIFF without a picture")
        if _is_camera_raw(tiff.pages[0]):
            raise DataError(formats.CAMERA_RAW.problem)
        stack = _Stack(tiff.series[0])
        first = stack.first
        if stack.is_plain and first.index == 0 and stack.count in (1, len(tiff.pages)):
            return int(stack.count)
        size = f"{first.imagewidth} x {first.imagelength} pixels of {first.samplesperpixel} bands"
        if first.imagewidth * first.imagelength > max_pixels or first.nbytes > _BYTES_A_PIXEL * max_pixels:
            raise DataError(f"{size}, more than data.max_pixels ({max_pixels})")
        inverted = first.photometric == PHOTOMETRIC.MINISWHITE
        numbers = planes.page_numbers(pages, stack.count)
        how = "min" if inverted and pages == "max" else pages
        values = planes.combined((stack.page(number, bands) for number in numbers), how)
        values = planes.upright(values, first.tags.valueof("Orientation", 1))
        return depth.raw(values, kind=stack.kind, bits=stack.bits, inverted=inverted)._replace(pages=stack.count)


def _is_camera_raw(first: Any) -> bool:
    """Whether a file's first page is a sensor's mosaic, or a preview of one within it."""
    return (
        "DNGVersion" in first.tags
        or first.photometric in (PHOTOMETRIC.CFA, PHOTOMETRIC.LINEAR_RAW)
        or (first.is_reduced and "SubIFDs" in first.tags)
    )


def _has_sound_ome(tiff: TiffFile) -> bool:
    """Whether the numbers of an OME header are such that tifffile, which lists all planes they state, ends soon."""
    left = _OME_PLANES
    try:
        for element in ElementTree.fromstring(tiff.ome_metadata or "").iter():
            stated = element.attrib
            if element.tag.endswith("Pixels"):
                left -= _stated_planes(element, tiff)
            elif "Start" in stated and "End" in stated:  # an axis within another one
                left -= abs(int((float(stated["End"]) - float(stated["Start"])) / float(stated.get("Step", 1))))
            if left < 0:
                return False
    except (ElementTree.ParseError, ArithmeticError, LookupError, ValueError):
        return False
    return True


def _stated_planes(pixels: ElementTree.Element, tiff: TiffFile) -> int:
    """How many planes a picture has by its sizes and by its parts. Raises: LookupError, ValueError."""
    order, count = pixels.attrib["DimensionOrder"], len(tiff.pages)
    if not order.startswith("XY") or sorted(order[2:]) != ["C", "T", "Z"]:
        raise ValueError(order)
    width, height, *outer = (abs(int(pixels.attrib[f"Size{axis}"])) for axis in order)
    parts = [part.attrib for part in pixels if part.tag.endswith("TiffData")]
    inside = [int(part.get("PlaneCount") or part.get("NumPlanes") or "IFD" in part) or count for part in parts]
    total = math.prod(outer) + sum(map(abs, inside))
    if total > _OME_PLANES:
        return total
    # tifffile divides by the size of one page: the first, if that is the first plane, else one where a part begins.
    begins = {int(part.get("IFD", 0)) for part in parts}
    first = [part for part in parts if not any(int(part.get(f"First{axis}", 0)) for axis in "ZCT")]
    if len(first) == 1 and int(first[0].get("IFD", 0)) == 0:
        begins = {0}
    models: list[Any] = [tiff.pages[number] for number in {0, *begins} if number < count]
    pyramids = max(len(page.subifds or ()) for page in models) * count
    smallest = max(1, min(int(page.size) for page in models))
    return total + width * height * math.prod(outer) // smallest + pyramids


class _Stack:
    """A series as pages of (H, W, B), each made of one or several of the file's own pages.

    Attributes:
        first: The file's first page of it, which tells how all are stored.
        count: Number of pages.
        bands: B, in RGB where the file has a palette or inks.
    """

    def __init__(self, series: Any) -> None:
        self._series, self.first = series, series.keyframe
        # With axes of length 1, which tifffile left out by default before version 2026.5.2.
        whole = hasattr(series, "get_shape")
        shape = series.get_shape(squeeze=False) if whole else series.shape
        axes = series.get_axes(squeeze=False) if whole else series.axes
        own = math.prod(self.first.shape)
        inside = next((at for at in range(len(shape)) if math.prod(shape[at:]) == own), len(shape))
        self._outside = list(zip(axes[:inside], shape[:inside], strict=True))
        self._shape, self._axes = shape[inside:], axes[inside:]
        if not {"Y", "X"} <= set(self._axes):
            raise DataError(f"a TIFF of the axes {axes}, expected each page to have Y and X; write it with these last")
        sizes = list(zip(self._axes, self._shape, strict=True))
        self._pages_inside = math.prod(size for axis, size in sizes if axis not in "YXCS")
        self._bands_inside = math.prod(size for axis, size in sizes if axis in "CS")
        if self.first.photometric in (PHOTOMETRIC.PALETTE, PHOTOMETRIC.SEPARATED):
            self._bands_inside = 3
        self.count = self._pages_inside * math.prod(size for axis, size in self._outside if axis not in "CS")
        self.bands = self._bands_inside * math.prod(size for axis, size in self._outside if axis in "CS")

    @property
    def is_plain(self) -> bool:
        """Whether Pillow reads each page well."""
        first = self.first
        samples = _PLAIN.get(first.photometric)
        return bool(
            first.samplesperpixel == samples
            and (first.bitspersample == 8 or (samples == 1 and first.bitspersample in (1, 2, 4)))
            and first.sampleformat == SAMPLEFORMAT.UINT
            and (samples == 1 or first.planarconfig == PLANARCONFIG.CONTIG)
            and first.compression in TiffImagePlugin.COMPRESSION_INFO
            and first.compression != COMPRESSION.WEBP  # which Pillow's wheels leave out
            and self._pages_inside == 1
            and self.bands == self._bands_inside
        )

    @property
    def _is_made_rgb(self) -> bool:
        """Whether tifffile converts it to RGB, as it does YCbCr of JPEG."""
        first = self.first
        contiguous = first.planarconfig == PLANARCONFIG.CONTIG
        return bool(first.photometric == PHOTOMETRIC.YCBCR and first.compression in _JPEG and contiguous)

    @property
    def kind(self) -> np.dtype[Any]:
        """Type of the values of `page`. Raises: DataError."""
        kind, bits = self.first.dtype, self.first.bitspersample
        if kind is None or kind.kind not in "buif" or not isinstance(bits, int):
            raise DataError(f"a TIFF whose pixels are of {bits} bits, SampleFormat {self.first.sampleformat:d}")
        if kind.kind == "b" or self.first.photometric == PHOTOMETRIC.PALETTE:
            return np.dtype(np.uint8)
        found: np.dtype[Any] = kind
        return found

    @property
    def bits(self) -> int | None:
        """As the file states them, of the values of `page`."""
        return None if self.first.photometric == PHOTOMETRIC.PALETTE else int(self.first.bitspersample)

    def page(self, number: int, bands: tuple[int, ...]) -> NDArray[Any]:
        """One page, (H, W) or (H, W, 3); only those of the file's pages are read that have its bands.

        Raises:
            DataError: If it has no such band, or the file lacks the page or is of a kind that is not read.
        """
        outside, inside = divmod(number, self._pages_inside)
        places = [divmod(band, self._bands_inside) for band in planes.band_numbers(bands, self.bands)]
        read = {at: self._read(self._number(outside, at)) for at in {at for at, _ in places}}
        found = [read[at][inside, :, :, band] for at, band in places]
        return found[0] if len(found) == 1 else np.stack(found, axis=2)

    def _number(self, page: int, band: int) -> int:
        """Which of the file's own pages that is, of those in the order of the axes."""
        number, step = 0, 1
        for axis, size in reversed(self._outside):
            if axis in "CS":
                band, at = divmod(band, size)
            else:
                page, at = divmod(page, size)
            number += at * step
            step *= size
        return number

    def _read(self, number: int) -> NDArray[Any]:
        """One of the file's pages as (pages, H, W, bands) of type `kind`."""
        series, first, kind = self._series, self.first, self.kind
        stored: NDArray[Any]
        if len(series) < math.prod(size for _, size in self._outside):  # one header for a run of pages, as in ImageJ's
            start = series.dataoffset + number * first.nbytes
            stored = series.parent.filehandle.read_array(series.parent.byteorder + kind.char, first.size, start)
        elif (page := series[number]) is None:
            raise DataError(f"its page {number} is missing")
        else:
            stored = page.asarray(maxworkers=1)
        values = _pages_first(stored.reshape(self._shape), self._axes)
        if first.photometric == PHOTOMETRIC.PALETTE:
            colours: NDArray[np.uint8] = (first.colormap >> 8).astype(np.uint8).T
            values = colours[values[..., 0]]
        elif first.photometric == PHOTOMETRIC.SEPARATED:
            most = 2.0**first.bitspersample - 1
            light = most - values[..., :4]
            values = np.rint(light[..., :3] * light[..., 3:] / most)
        elif first.photometric not in _AS_THEY_ARE and not self._is_made_rgb:
            name = getattr(first.photometric, "name", first.photometric)
            raise DataError(f"a TIFF of photometric interpretation {name}; convert it to RGB or grey")
        return values.astype(kind, copy=False)


def _pages_first(values: NDArray[Any], axes: str) -> NDArray[Any]:
    """Bring axes into the order pages, Y, X, bands, with one axis of pages and one of bands."""
    pages = [at for at, axis in enumerate(axes) if axis not in "YXCS"]
    picture = [axes.index(axis) for axis in "YX" if axis in axes]
    bands = [at for at, axis in enumerate(axes) if axis in "CS"]
    size = [math.prod(values.shape[at] for at in pages), *(values.shape[at] for at in picture)]
    return values.transpose(pages + picture + bands).reshape(*size, math.prod(values.shape[at] for at in bands))
