"""Results of encoders that params.yaml no longer lists: what they are, and their removal.

python -m tasks.report.prune [--delete]
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path

from tasks.shared.operations import params
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout


def unlisted(encoders: Iterable[str]) -> list[Path]:
    """Artifacts, metrics and plots of encoders other than these, in the order of the stages."""
    kept = set(encoders)
    found = []
    for name in ("pretrain", "embed", "cluster", "linear", "adapt"):
        # A link leads to a folder that another workspace uses too.
        linked = layout.out(name).is_symlink()
        found += [path for path in _entries(layout.out(name)) if path.is_dir() and not linked and path.name not in kept]
        for root in (layout.METRICS, layout.PLOTS):
            found += [path for path in _entries(root / name) if not path.is_dir() and path.stem not in kept]
    return found


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def main() -> None:
    """Say what would be removed, or remove it."""
    parser = argparse.ArgumentParser(prog="python -m tasks.report.prune", description=__doc__.partition("\n")[0])
    parser.add_argument("--delete", action="store_true", help="remove them; DVC's cache and git still have them")
    delete = parser.parse_args().delete
    with errors_as_one_line():
        paths = unlisted(params.load().encoders)
        for path in paths:
            if delete and path.is_symlink():
                path.unlink()
            elif delete:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            say(f"{'removed' if delete else 'would remove'} {path}")
        if not paths:
            say("nothing: all results are of encoders that params.yaml lists")
        elif not delete:
            say("to do so: python -m tasks.report.prune --delete")


if __name__ == "__main__":
    main()
