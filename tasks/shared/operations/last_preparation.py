"""How many images are on another side than when the data were last prepared, so that nobody compares their numbers.

Nothing here can change an output. DVC removes a stage's outputs before it runs the stage, so the last ones are in its
cache, unless the stage is run by hand.
"""

from __future__ import annotations

import configparser
import csv
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepclust import files as saved
from deepclust.errors import DeepclustError
from tasks.shared.outputs import layout

# The outputs of `prepare` in DVC's lock file, which always has this form. A YAML reader would take longer for the whole
# file than the comparison does.
_LOCKED = re.compile(
    rf"^  prepare:\n(?:    .*\n)*?    outs:\n(?:    .*\n)*?    - path: {layout.PREPARED}\n"
    r"(?:      .*\n)*?      md5: (\w+\.dir)\n",
    re.MULTILINE,
)
_ITEMS = {split: f"{split}/items.csv" for split in layout.SPLITS}
_HELDOUT = "train/heldout.npy"


class _Item(NamedTuple):
    """One prepared image; the id is empty where an earlier version has prepared it. Sides: train, heldout, test."""

    id: str
    path: str
    side: str


def warning(folder: Path) -> str | None:
    """What to say if images of a new preparation, in `folder`, have changed sides. None too if the last one is lost."""
    try:
        before = _items(_last())
    except (OSError, ValueError, KeyError, TypeError, DeepclustError, csv.Error, configparser.Error):
        return None
    now = _items(_files(folder))
    by_id = all(item.id for item in before)
    sides: dict[str, set[str]] = {}
    for item in before:
        sides.setdefault(item.id if by_id else item.path, set()).add(item.side)
    again = [(item.side, sides.get(item.id if by_id else item.path)) for item in now]
    moved = sum(old is not None and side not in old for side, old in again)
    if not moved:
        return None
    counts = {
        side: [Counter(item.side for item in items)[side] for items in (before, now)] for side in ("test", "heldout")
    }
    return (
        f"{moved} of {sum(old is not None for _, old in again)} images that were prepared before are on another side "
        f"now (test {counts['test'][0]} → {counts['test'][1]}, held out {counts['heldout'][0]} → "
        f"{counts['heldout'][1]}): numbers on these are not comparable with earlier ones"
    )


def _files(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in (*_ITEMS.values(), _HELDOUT)}


def _last() -> Mapping[str, Path]:
    """The files of the last preparation by their names. Raises: OSError, ValueError, KeyError, configparser.Error."""
    if layout.PREPARED.exists():
        return _files(layout.PREPARED)
    locked = _LOCKED.search(Path("dvc.lock").read_text(encoding="utf-8"))
    if not locked:
        raise ValueError("no outputs in dvc.lock")
    config = configparser.ConfigParser(interpolation=None)
    config.read([".dvc/config", ".dvc/config.local"], encoding="utf-8")
    cache = Path(".dvc", config.get("cache", "dir", fallback="cache")).expanduser() / "files" / "md5"

    def cached(md5: str) -> Path:
        return cache / md5[:2] / md5[2:]

    return {item["relpath"]: cached(item["md5"]) for item in json.loads(cached(locked[1]).read_text(encoding="utf-8"))}


def _items(files: Mapping[str, Path]) -> list[_Item]:
    heldout = set(saved.array(files[_HELDOUT], (None,), np.int64).tolist())
    items = []
    for split, name in _ITEMS.items():
        with files[name].open(encoding="utf-8", newline="") as file:
            for index, row in enumerate(csv.DictReader(file)):
                side = "heldout" if split == "train" and index in heldout else split
                items.append(_Item(row.get("id") or "", row["path"], side))
    return items
