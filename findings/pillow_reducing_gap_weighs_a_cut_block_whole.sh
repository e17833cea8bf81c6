#!/usr/bin/env bash
# Pillow 13.0.0: `Image.resize(size, reducing_gap=3.0)` shifts the whole picture where the side is no multiple of the reduction.
#
# With `reducing_gap`, a large image is first shrunk by whole blocks, and the rest by the filter. The last block of a side holds what is left
# over, often a few pixels only, but in the filter it weighs as much as a whole block.
# Expected: nearly the result without `reducing_gap`; the documentation calls a gap of 3 hard to tell from it in most cases.
# Seen: a ramp of 1,000 grey levels from 0 to 255 has a mean of 127.5. Reduced to a single pixel it is 128 without a gap, and 142 with a gap of
# 3. Reduced to two pixels it is [70, 185], and [67, 193]. To four pixels only the last differs, by 3.
# So small thumbnails of large images are off by more than rounding, in one direction; from twelve pixels a side on it is 1 level.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'pillow==13.0.0'
"$folder/venv/bin/python" - <<'PYTHON'
from PIL import Image

ramp = Image.frombytes("L", (1, 1000), bytes(round(255 * row / 999) for row in range(1000)))


def reduced(length: int, gap: float | None) -> list[int]:
    return list(ramp.resize((1, length), Image.Resampling.BICUBIC, reducing_gap=gap).tobytes())


found = {length: (reduced(length, None), reduced(length, 3.0)) for length in (1, 2, 4)}
print(found)
assert found == {
    1: ([128], [142]),
    2: ([70, 185], [67, 193]),
    4: ([33, 94, 161, 222], [33, 94, 160, 225]),
}
eight = zip(reduced(8, None), reduced(8, 3.0), strict=True)
assert max(abs(plain - gap) for plain, gap in eight) <= 2
PYTHON
echo "as described: with reducing_gap the block that is cut off weighs as a whole one"
