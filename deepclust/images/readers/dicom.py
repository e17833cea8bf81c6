"""DICOM: X-ray, CT, MR and other medical pictures, through the window that the file states or in its units.

Grey values become units by the file's rescale or table (modality LUT; of CT, Hounsfield units), and then grey levels by
its first window or table (VOI LUT), as a viewer shows them. Without a window they keep their units, of which a data
set's black and white are settled as for other deep pixels. Padding outside of the picture is black.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import pixels as decoding

from deepclust.errors import DataError
from deepclust.images import depth
from deepclust.images.readers import dicom_codecs, planes

dicom_codecs.register()
# It warns of values that break a rule of the standard and are read all the same.
warnings.filterwarnings("ignore", module="pydicom")
# Where multi-frame files state the rescale and the window of all frames, or of each.
_OF_FRAMES = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_LARGE = 1e12
_WINDOWED = "8 bits through a window"


def read(file: BinaryIO, *, pages: str | int, bands: tuple[int, ...], max_pixels: int) -> depth.Raw:
    """Decode a picture.

    Args:
        file: Of DICOM's file format.
        pages: Which frames; see `planes.page_numbers`.
        bands: See `planes.band_numbers`.
        max_pixels: A file whose header says more is not decoded.

    Raises:
        DataError: If it has more pixels, none, no such frame or band, or is compressed in a way that is not read here.
    """
    file.seek(0)
    head = pydicom.dcmread(file, stop_before_pixels=True)
    rows, columns = head.get("Rows") or 0, head.get("Columns") or 0
    if not rows * columns:
        raise DataError("DICOM without pixels, such as a report; remove it")
    if rows * columns > max_pixels:
        raise DataError(f"{columns} x {rows} pixels, more than data.max_pixels ({max_pixels})")
    _check_compression(head)
    count = int(head.get("NumberOfFrames") or 1)
    numbers = planes.page_numbers(pages, count)
    first: depth.Raw | None = None

    def frames() -> Iterator[NDArray[Any]]:
        nonlocal first
        for number, values in zip(numbers, decoding.iter_pixels(file, indices=list(numbers)), strict=True):
            found = _meant(values, head, number)
            first = first or found
            yield planes.chosen(found.values, bands)

    brightest = "min" if head.PhotometricInterpretation == "MONOCHROME1" else "max"
    values = planes.combined(frames(), brightest if pages == "max" else pages)
    assert first is not None
    return first._replace(values=values, pages=count)


def _check_compression(head: pydicom.Dataset) -> None:
    syntax = head.file_meta.TransferSyntaxUID
    try:
        # A deflated file is inflated whole, however large that is.
        readable = decoding.get_decoder(syntax).is_available and not syntax.is_deflated
    except NotImplementedError:  # what pydicom raises of a compression that it has no decoder for, such as video
        readable = False
    if not readable:
        raise DataError(f"DICOM compressed as {syntax.name}: decompress it, as gdcmconv --raw does")


def _meant(values: NDArray[Any], head: pydicom.Dataset, frame: int) -> depth.Raw:
    """Stored values, (H, W) or (H, W, 3), as what they stand for."""
    kind = head.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        return depth.raw(decoding.apply_color_lut(values, head))
    if values.ndim == 3:
        return depth.raw(values, bits=head.BitsStored)
    inverted = kind == "MONOCHROME1"
    stated = _transformation(head, frame)
    units = _in_units(values, stated, inverted)
    found = _windowed(units, stated) or units
    if "PixelPaddingValue" in head:
        ends = int(head.PixelPaddingValue), int(head.get("PixelPaddingRangeLimit", head.PixelPaddingValue))
        padding = (values >= min(ends)) & (values <= max(ends))
        if padding.any() and not padding.all():
            rest = found.values[~padding]
            found.values[padding] = rest.max() if inverted else rest.min()
    return found


def _transformation(head: pydicom.Dataset, frame: int) -> pydicom.Dataset:
    """The header, with the rescale and the window of this frame."""
    stated = pydicom.Dataset(head)
    for groups in (
        head.get("SharedFunctionalGroupsSequence", [])[:1],
        head.get("PerFrameFunctionalGroupsSequence", [])[frame : frame + 1],
    ):
        for group in groups:
            for name in _OF_FRAMES:
                for item in group.get(name, [])[:1]:
                    stated.update(item)
    return stated


def _in_units(values: NDArray[Any], stated: pydicom.Dataset, inverted: bool) -> depth.Raw:
    """Values after the modality LUT: whole numbers wherever its numbers are."""
    unit = stated.get("RescaleType") or stated.get("ModalityLUTType") or stated.get("Modality") or "units"
    if table := stated.get("ModalityLUTSequence"):
        units = decoding.apply_modality_lut(values, stated)
        bits = table[0].LUTDescriptor[2]
        return depth.Raw(units.astype(np.int32), f"int {unit}", (0.0, 2.0**bits - 1), inverted)
    slope, intercept = float(stated.get("RescaleSlope") or 1), float(stated.get("RescaleIntercept") or 0)
    plain = depth.raw(values, bits=None if values.dtype.kind == "f" else stated.BitsStored, inverted=inverted)
    if (slope, intercept) == (1, 0):
        return plain
    whole = slope.is_integer() and intercept.is_integer() and values.dtype.kind != "f"
    units = values * slope + intercept
    black, white = sorted(value * slope + intercept for value in plain.stated)
    name = f"{'int' if whole else 'float'} {unit}"
    return depth.Raw(units.astype(np.int32) if whole else units, name, (black, white), inverted)


def _windowed(found: depth.Raw, stated: pydicom.Dataset) -> depth.Raw | None:
    """Grey levels from 0 to 255, if the file has a window or a table of them."""
    if table := stated.get("VOILUTSequence"):
        shown = decoding.apply_voi(np.rint(found.values).astype(np.int64), stated)
        black, white = 0.0, 2.0 ** table[0].LUTDescriptor[2] - 1
    elif stated.get("WindowWidth") and stated.get("WindowCenter") is not None:
        with np.errstate(over="ignore"):
            shown = decoding.apply_windowing(found.values, stated)
            black, white = decoding.apply_windowing(np.array([-_LARGE, _LARGE]), stated)
    else:
        return None
    levels = np.rint((shown - black) * (255 / (white - black))).clip(0, 255).astype(np.uint8)
    return depth.raw(levels, inverted=found.inverted)._replace(depth=_WINDOWED)
