#!/usr/bin/env bash
# Pillow 13.0.0: a 16-bit colour TIFF whose planes are stored one after the other opens as an 8-bit picture made of single bytes, without an error.
#
# tifffile writes an array (3, height, width) of uint16 this way by default (PlanarConfiguration 2), which TIFF 6.0 allows for RGB.
# Expected: the high byte of each value, as Pillow gives for 16-bit colour stored pixel by pixel, or an error.
# Seen: mode RGB, where the values of a row are the bytes of its first half: 0x1000 0x2000 0x3000 0x4000 becomes 0x00 0x10 0x00 0x20.
# The other half of every plane is never read. 8-bit planes are read as expected.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'pillow==13.0.0' 'tifffile==2026.3.3' 'numpy==2.4.6'
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import tifffile
from PIL import Image

row = np.array([0x1000, 0x2000, 0x3000, 0x4000], np.uint16)
planes = np.stack([row, row, row])[:, None]  # three planes of one row of four pixels

PLANES = {"photometric": "rgb", "planarconfig": "separate"}


def red(values: np.ndarray, **options: str) -> list[int]:
    """The red channel that Pillow reads."""
    tifffile.imwrite("picture.tif", values, **options)
    with Image.open("picture.tif") as image:
        assert (image.mode, image.size) == ("RGB", (4, 1))
        return np.asarray(image)[0, :, 0].tolist()


high = (row >> 8).tolist()
found = {
    "planes, 16 bits": red(planes, **PLANES),
    "pixels, 16 bits": red(np.moveaxis(planes, 0, -1), photometric="rgb"),
    "planes, 8 bits": red((planes >> 8).astype(np.uint8), **PLANES),
}
print(found)
assert found == {"planes, 16 bits": [0x00, 0x10, 0x00, 0x20], "pixels, 16 bits": high, "planes, 8 bits": high}
PYTHON
echo "as described: planes of 16 bits are read as bytes"
