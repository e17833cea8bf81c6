#!/usr/bin/env bash
# safetensors 0.8.0: a full disk is a SafetensorError without errno, where every other writer raises OSError.
#
# A training script that handles a full disk (`except OSError`, by errno) handles that of `open(…).write`.
# Expected: the same from `save_file`, as its reader gives FileNotFoundError for a missing file.
# Seen: SafetensorError, which is no OSError and has no errno; the system's number is only in its text ("os error 27").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'safetensors==0.8.0' 'numpy==2.2.6'
cd "$folder"
venv/bin/python - <<'PY'
import resource
import signal

import numpy as np
from safetensors.numpy import load_file, save_file

rows = np.zeros(1000, np.float32)
try:
    load_file("missing.safetensors")
except FileNotFoundError as error:
    print("missing file:", type(error).__name__, error.errno)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256))  # stands for a full disk
try:
    with open("rows", "wb") as file:
        file.write(rows.tobytes())
except OSError as error:
    print("write:", type(error).__name__, error.errno)
else:
    raise SystemExit("write raised nothing")
try:
    save_file({"rows": rows}, "rows.safetensors")
except Exception as error:
    print("save_file:", type(error).__name__, getattr(error, "errno", None), error)
    assert not isinstance(error, OSError)
    assert "os error" in str(error)
else:
    raise SystemExit("save_file raised nothing")
PY
