#!/usr/bin/env bash
# pillow-heif 1.8.1: `save(…, exif=exif)` keeps the orientation if `exif` is bytes, and loses it if it is Pillow's own `Image.Exif`.
#
# Pillow's writers (JPEG, PNG, WebP, TIFF) take both, and write the same file.
# Expected: an HEIF file whose picture of 24×16 pixels is shown turned, as 16×24, in both cases.
# Seen: with the object, the file has no orientation: a photograph that is copied to HEIF with its EXIF lies on its side, without an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'pillow==13.0.0' 'pillow-heif==1.8.1'
"$folder/venv/bin/python" - <<'PYTHON'
import io

import pillow_heif
from PIL import Image, ImageOps

pillow_heif.register_heif_opener()


def shown(kind: str, exif: Image.Exif | bytes) -> tuple[int, int]:
    """Size of the picture as a viewer shows it."""
    file = io.BytesIO()
    Image.new("RGB", (24, 16)).save(file, kind, exif=exif)
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image).size


exif = Image.Exif()
exif[0x0112] = 6  # to be turned by 90 degrees
found = {(kind, type(given).__name__): shown(kind, given) for kind in ("JPEG", "HEIF") for given in (exif, exif.tobytes())}
print(found)
assert found == {
    ("JPEG", "Exif"): (16, 24),
    ("JPEG", "bytes"): (16, 24),
    ("HEIF", "Exif"): (24, 16),
    ("HEIF", "bytes"): (16, 24),
}
PYTHON
echo "as described: EXIF as an object is lost"
