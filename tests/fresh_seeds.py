"""Repeats the tests against independent references at seeds that nobody has seen, and prints these.

python -m tests.fresh_seeds [pytest's options]
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

import pytest

_COUNT = 3


def main() -> int:
    """Pytest's exit code."""
    seeds = ",".join(str(secrets.randbelow(1 << 31)) for _ in range(_COUNT))
    os.environ["DEEPCLUST_TEST_SEEDS"] = seeds
    again = f"DEEPCLUST_TEST_SEEDS={seeds} python -m pytest -m reference tests/deepclust"
    print(f"seeds {seeds}; again: {again}", flush=True)
    return pytest.main(["-m", "reference", str(Path(__file__).parent / "deepclust"), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
