#!/usr/bin/env bash
# Pillow 13.0.0: a grey TIFF in which 0 is white (PhotometricInterpretation 0) is inverted on reading if it has 8 bits, but not if it has 16.
#
# Expected: the same picture in both depths; TIFF 6.0 defines the tag for any number of bits.
# Seen: 8 bits (0, 100, 255) become (255, 155, 0); 16 bits (0, 25700, 65535) stay so in mode I;16, a negative.
# No attribute of the opened image but the tag itself tells the two cases apart.
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


def read(values: list[int], dtype: type[np.generic]) -> tuple[str, list[int]]:
    """Mode and values that Pillow reads where 0 is white."""
    tifffile.imwrite("grey.tif", np.array([values], dtype), photometric="miniswhite")
    with Image.open("grey.tif") as image:
        return image.mode, np.asarray(image)[0].tolist()


shallow, deep = read([0, 100, 255], np.uint8), read([0, 25700, 65535], np.uint16)
print(shallow, deep)
assert shallow == ("L", [255, 155, 0])
assert deep == ("I;16", [0, 25700, 65535])
PYTHON
echo "as described: only 8 bits are inverted"
