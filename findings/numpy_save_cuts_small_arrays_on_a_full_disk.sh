#!/usr/bin/env bash
# NumPy 2.4.6: on a full disk `numpy.save` writes half of an array of less than 4 KiB and raises nothing.
#
# Labels of a few hundred images, or the centroids of a few clusters, are such arrays. The disk is played by a limit on the size of a file.
# Expected: OSError, as from `open(…).write`, and as NumPy itself gives for larger arrays.
# Seen: of 400 values `save` keeps 128 bytes of header and what still fits, without an error, by path and by open file alike; of 2,000
# values it raises "2000 requested and … written". Reading the small file fails later, wherever that is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'numpy==2.4.6'
cd "$folder"
venv/bin/python - <<'PY'
import os
import resource
import signal

import numpy as np

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def seen(write):
    try:
        write()
    except OSError as error:
        return f"OSError: {error}"
    return f"no error, {os.path.getsize('array.npy')} bytes"


def by_file():
    with open("array.npy", "wb") as file:
        np.save(file, small)


small, large = np.arange(400.0, dtype=np.float32), np.arange(2000.0, dtype=np.float32)
found = {
    "small, by path": seen(lambda: np.save("array.npy", small)),
    "small, by open file": seen(by_file),
    "large, by path": seen(lambda: np.save("array.npy", large)),
}
for name, what in found.items():
    print(f"{name}: {what}")
assert found["small, by path"] == "no error, 1000 bytes"
assert found["small, by open file"] == "no error, 1000 bytes"
assert found["large, by path"].startswith("OSError: 2000 requested")
try:
    np.load("array.npy")
except ValueError as error:
    print("reading it:", error)
PY
