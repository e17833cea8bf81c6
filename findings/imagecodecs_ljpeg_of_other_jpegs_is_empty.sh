#!/usr/bin/env bash
# imagecodecs 2026.3.6: `ljpeg_decode` of a JPEG that is not lossless returns an array of 0×0 pixels, without an error.
#
# DICOM's transfer syntaxes say which of JPEG's processes a frame has, and files in the wild state the wrong one.
# Expected: an LjpegError, as for bytes that are no JPEG; `jpeg8_decode` reads either process by itself.
# Seen: a baseline JPEG of 48×64 pixels gives shape (0, 0), so the mistake shows only where the size is compared.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'imagecodecs==2026.3.6' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PYTHON'
import imagecodecs
import numpy as np

picture = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)
baseline, lossless = imagecodecs.jpeg8_encode(picture), imagecodecs.ljpeg_encode(picture)
try:
    imagecodecs.ljpeg_decode(b"no JPEG at all")
    refused = False
except imagecodecs.LjpegError:
    refused = True
found = {
    "lossless": imagecodecs.ljpeg_decode(lossless).shape,
    "baseline": imagecodecs.ljpeg_decode(baseline).shape,
    "lossless by jpeg8": imagecodecs.jpeg8_decode(lossless).shape,
    "baseline by jpeg8": imagecodecs.jpeg8_decode(baseline).shape,
}
print(found, "no JPEG is refused" if refused else "no JPEG is accepted")
assert refused
assert found.pop("baseline") == (0, 0)
assert set(found.values()) == {(48, 64)}
PYTHON
echo "as described: a baseline JPEG becomes nothing"
