"""Removes what is damaged in DVC's cache, so that `dvc repro` makes it anew.

python -m tasks.verify

The flow checks what it restores by itself. Plain `dvc repro` does not: DVC takes what it has in its cache for whole.
"""

from __future__ import annotations

import argparse

from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.processes import dvc_runner
from tasks.shared.operations.text import say


def main() -> None:
    """Hash the whole cache."""
    argparse.ArgumentParser(
        prog="python -m tasks.verify", description="Remove what is damaged in DVC's cache."
    ).parse_args()
    with errors_as_one_line():
        damaged = dvc_runner.drop_damaged()
    say(f"{damaged} damaged files removed; run `dvc repro`" if damaged else "DVC's cache is whole")


if __name__ == "__main__":
    main()
