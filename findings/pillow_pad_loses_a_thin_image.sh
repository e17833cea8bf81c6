#!/usr/bin/env bash
# Pillow 13.0.0: `ImageOps.pad` returns nothing but background for an image that is thinner than the target's aspect allows, without an error.
#
# `pad` scales the image to fit inside the target (`ImageOps.contain`) and pastes it on the background. The shorter side is rounded to whole
# pixels and may become 0: a white image of 1×400 (or 2×300) pixels in a target of 64×64 is scaled to 0×64.
# Expected: at least one white row or column, or an error. `ImageOps.cover`, the counterpart, keeps the image.
# Seen: `contain` returns an image of 0×64 pixels, and `pad` an image of 64×64 that is black all over. A white image of 128×64 is padded as expected.
# So a data set with strips (scan lines, spectrograms, rows of text) gets empty images, which no check of sizes finds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'pillow==13.0.0'
"$folder/venv/bin/python" - <<'PYTHON'
from PIL import Image, ImageOps


def white(size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Size of the contained image, and the white pixels of the padded one."""
    image = Image.new("L", size, 255)
    padded = ImageOps.pad(image, (64, 64))
    assert padded.size == (64, 64)
    return ImageOps.contain(image, (64, 64)).size, padded.histogram()[255]


found = {size: white(size) for size in ((128, 64), (1, 400), (400, 1), (2, 300))}
print(found)
assert found == {
    (128, 64): ((64, 32), 64 * 32),
    (1, 400): ((0, 64), 0),
    (400, 1): ((64, 0), 0),
    (2, 300): ((0, 64), 0),
}
PYTHON
echo "as described: thin images are lost by ImageOps.pad"
