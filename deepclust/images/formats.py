"""What a file is: an image that can be read, one that can not be and what to do about it, or no image at all.

A file is listed by its suffix; where that is missing or says nothing, by its first bytes. What it is read as is decided
by its bytes alone, so a wrong suffix does no harm.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from deepclust.images import npy

HEAD = 352  # bytes, up to the end of NIfTI's magic
_TO_PNG = "convert it to PNG"
_TO_TIFF = "convert it to TIFF"
_SLICES = "save its slices as TIFF (docs/data.md)"
_TILES = "cut it into tiles"
_OME = "export it as OME-TIFF"


@cache
def _is_installed(module: str) -> bool:
    return bool(module and find_spec(module))


class Format(NamedTuple):
    """A format of image files.

    Attributes:
        name: As users call it.
        suffixes: In lower case, separated by spaces.
        needs: The module that reads it; none if nothing here does.
        remedy: What a user can do who has such files and no reader.
    """

    name: str
    suffixes: str
    needs: str = ""
    remedy: str = _TO_PNG

    @property
    def problem(self) -> str | None:
        """Why such a file can not be read here, and the remedy; None if it can be."""
        return None if _is_installed(self.needs) else f"{self.name}: {self.remedy}"


STACK = Format("NumPy stack", ".npy .npz", "numpy")
CAMERA_RAW = Format(
    "camera raw",
    ".3fr .arw .bay .cr2 .cr3 .crw .dcr .dng .erf .fff .iiq .k25 .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw "
    ".rw2 .rwl .rwz .sr2 .srf .srw .x3f",
    remedy="develop it to TIFF or JPEG",
)
ALL = (
    Format("JPEG", ".jpg .jpeg .jpe .jfif", "PIL"),
    Format("PNG", ".png .apng", "PIL"),
    Format("BMP", ".bmp .dib", "PIL"),
    Format("GIF", ".gif", "PIL"),
    Format("WEBP", ".webp", "PIL"),
    Format("PPM", ".ppm .pgm .pbm .pnm .pfm", "PIL"),
    Format("TIFF", ".tif .tiff .btf .tf8", "tifffile"),
    Format("AVIF", ".avif .avifs", "PIL"),
    Format("JPEG 2000", ".jp2 .j2k .j2c .jpc .jpf .jpx .jph .jhc", "PIL"),
    Format("HEIC", ".heic .heif .hif .heics", "pillow_heif", "install deepclust[heic], or convert it to JPEG"),
    Format("JPEG XL", ".jxl", "imagecodecs", "install imagecodecs, or convert it to PNG"),
    Format("DICOM", ".dcm .dicom .ima", "pydicom", "install deepclust[dicom], or convert it to PNG"),
    STACK,
    CAMERA_RAW,
    Format("Photoshop", ".psd .psb"),
    Format("GIMP", ".xcf"),
    Format("SVG", ".svg .svgz", remedy="draw it as PNG"),
    Format("EPS", ".eps .epsf", remedy="draw it as PNG"),
    Format("OpenEXR", ".exr", remedy=_TO_TIFF),
    Format("Radiance HDR", ".rgbe", remedy=_TO_TIFF),
    Format("FITS", ".fits", remedy=_TO_TIFF),
    Format("JPEG XR", ".jxr .wdp .hdp"),
    Format("JPEG-LS", ".jls"),
    Format("PAM", ".pam"),
    Format("TGA", ".tga"),
    Format("PCX", ".pcx"),
    Format("DDS", ".dds"),
    Format("QOI", ".qoi"),
    Format("DjVu", ".djvu .djv"),
    Format("icon", ".ico .icns .cur"),
    Format("whole slide", ".svs .ndpi .scn .mrxs .vms .vmu .bif .vsi .svslide .qptiff .isyntax", remedy=_TILES),
    Format("CZI", ".czi", remedy=_OME),
    Format("LIF", ".lif", remedy=_OME),
    Format("ND2", ".nd2", remedy=_OME),
    Format("LSM", ".lsm", remedy=_OME),
    Format("OIF", ".oif .oib .oir", remedy=_OME),
    Format("DeltaVision", "", remedy=_OME),
    Format("MRC", ".mrcs", remedy=_OME),
    Format("NIfTI", ".nii .nii.gz", remedy=_SLICES),
    Format("Analyze", "", remedy=_SLICES),
    Format("MetaImage", ".mha .mhd", remedy=_SLICES),
    Format("NRRD", ".nrrd", remedy=_SLICES),
    Format("MINC", ".mnc", remedy=_SLICES),
    Format("FreeSurfer", ".mgz .mgh", remedy=_SLICES),
    Format("HDF5", ".h5 .hdf5 .hdf .he5 .ims", remedy=_SLICES),
)
_NAMED = {format_.name: format_ for format_ in ALL}
_SUFFIXES = {suffix: format_ for format_ in ALL for suffix in format_.suffixes.split()}
# Where a format's first bytes are, from the more to the less specific.
_MAGIC = (
    (128, b"DICM", "DICOM"),
    (344, b"n+1\0", "NIfTI"),
    (344, b"ni1\0", "NIfTI"),
    (4, b"ftypcrx ", "camera raw"),
    (0, b"\xff\xd8\xff\xf7", "JPEG-LS"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WEBP"),
    (8, b"CR\2\0", "camera raw"),
    *((0, magic, "TIFF") for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *(
        (0, magic, "camera raw")
        for magic in (b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM")
    ),
    (6, b"HEAPCCDR", "camera raw"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "Photoshop"),
    (0, b"gimp xcf", "GIMP"),
    (0, b"%!PS-Adobe", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"<svg", "SVG"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"#?RGBE", "Radiance HDR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"II\xbc\1", "JPEG XR"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"AT&TFORM", "DjVu"),
    (0, b"ZISRAWFILE", "CZI"),
    (0, b"\xda\xce\xbe\x0a", "ND2"),
    (0, b"NRRD000", "NRRD"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (0, b"\x5c\1\0\0", "Analyze"),
    (0, b"\0\0\1\x5c", "Analyze"),
    (208, b"MAP ", "MRC"),
    (96, b"\xa0\xc0", "DeltaVision"),
    (0, b"\x93NUMPY", STACK.name),
)
_PNM = {b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF"}


def of(path: str) -> Format | None:
    """The format of a regular file, or None if it is no image. It is opened only where its suffix does not say."""
    name = path.rpartition("/")[2]
    if name.upper() == "DICOMDIR":  # an index, in DICOM's own format
        return None
    format_ = by_name(name)
    if format_ is None:
        try:
            with Path(path).open("rb") as file:
                format_ = by_content(file.read(HEAD))
        except OSError:
            return None
    return None if format_ is STACK and not npy.is_stack(Path(path)) else format_


def by_name(name: str) -> Format | None:
    """The format that a file's name states."""
    _, *suffixes = name.lower().split(".")  # much cheaper than Path, and a folder may hold millions
    return _SUFFIXES.get("." + ".".join(suffixes[-2:])) or _SUFFIXES.get("." + "".join(suffixes[-1:]))


def by_content(content: bytes) -> Format | None:
    """The format of a file that begins with these bytes. Most camera raws begin like any TIFF."""
    for offset, magic, name in _MAGIC:
        if content.startswith(magic, offset):
            return _NAMED[name]
    if content[4:8] == b"ftyp":  # then all brands that the file conforms to; films have others
        size = int.from_bytes(content[:4], "big")
        brands = {content[start : start + 4] for start in range(8, min(size, len(content)), 4)}
        kinds = (("AVIF", {b"avif", b"avis"}), ("HEIC", {b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1"}))
        return next((_NAMED[name] for name, own in kinds if brands & own), None)
    # Magic of two letters, which text may begin with as well, needs what follows it.
    if content[:2] == b"BM" and content[6:10] == bytes(4) and len(content) > 26:
        return _NAMED["BMP"]
    if content[:2] in _PNM and content[2:3].isspace():
        return _NAMED["PPM"]
    if content.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<?xml") and b"<svg" in content:
        return _NAMED["SVG"]
    return None


def readable() -> str:
    """The names of the formats that can be read here, for messages."""
    return ", ".join(format_.name for format_ in ALL if not format_.problem)
