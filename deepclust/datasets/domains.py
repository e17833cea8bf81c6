"""Domains: folders `domain/class/images` with images that are shifted already, such as sketches.

Class folders have the names of the training data's classes. Images directly in a domain's folder, in its folder
`unlabelled`, or in one that is no class of the training data, have no label. If the training data have no classes, a
domain's own class folders measure the clusters.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepclust.errors import DataError
from deepclust.images.find import Files
from deepclust.images.labels import UNLABELLED, same

CLEAN = "clean"  # the test images without a shift are called so (`deepclust.adaptation.shifts`)
_SHOWN = 5


class Domain(NamedTuple):
    """One domain, of which no image is read yet.

    Attributes:
        name: Of its folder.
        paths: N, relative to the folder of domains.
        labels: (N,) int64, -1 unknown.
    """

    name: str
    paths: list[str]
    labels: NDArray[np.int64]


def load(root: Path, files: Files, classes: Sequence[str]) -> tuple[list[Domain], list[str]]:
    """The domains in a folder, and what the user should know of them.

    Args:
        root: The folder, for messages.
        files: What it holds; stacks are skipped.
        classes: Names of the labels; empty if the training data have none.

    Raises:
        DataError: If an image lies beside the domains, or a domain has the name that stands for no shift.
    """
    files.skip_stacks("NumPy stack, which is no domain: save its images as PNG or TIFF")
    found: dict[str, list[str]] = {}
    for path in files.images:
        name, _, rest = path.partition("/")
        if not rest:
            raise DataError(
                f"expected folders domain/class/images in {root}, got the image {path} beside them; move it into one"
            )
        found.setdefault(name, []).append(path)
    if CLEAN in found:
        raise DataError(
            f"expected other names of domains in {root} than {CLEAN!r}, which is that of the test images without a "
            "shift; rename it"
        )
    notes = []
    domains = []
    for name, paths in sorted(found.items()):
        known = classes or sorted({folder for path in paths if (folder := _folder(path))})
        if known and not classes:
            notes.append(
                f"{name}: the training data have no classes, so the domain's own {len(known)} class folders are "
                "numbered, to measure the clusters only"
            )
        labels = _labels(paths, known)
        unknown = Counter(
            folder for path, label in zip(paths, labels, strict=True) if label < 0 and (folder := _folder(path))
        )
        if unknown:
            notes.append(_about_unknown(name, unknown, known))
        domains.append(Domain(name, paths, np.array(labels, np.int64)))
    return domains, notes


def _folder(path: str) -> str | None:
    """The class folder of domain/class/image; None for domain/image and domain/unlabelled/image."""
    parts = path.split("/")
    return None if len(parts) == 2 or parts[1].lower() in UNLABELLED else parts[1]


def _labels(paths: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Numbers of the classes whose names the folders have, apart from case and blanks; -1 where there is none."""
    numbers = {same(name): number for number, name in enumerate(classes)}
    labels = []
    for path in paths:
        parts = path.split("/")[1:-1] if _folder(path) else []
        # A class may have a slash in its name, as FashionMNIST's T-shirt/top: then it is a folder within a folder.
        names = ("/".join(parts[:depth]) for depth in range(len(parts), 0, -1))
        labels.append(next((numbers[same(name)] for name in names if same(name) in numbers), -1))
    return labels


def _about_unknown(name: str, unknown: Counter[str], classes: Sequence[str]) -> str:
    some = []
    for folder, count in list(unknown.items())[:_SHOWN]:
        near = difflib.get_close_matches(folder, classes, n=1)
        some.append(f"{folder} ({count}{f'; is it {near[0]}?' if near else ''})")
    return (
        f"warning: the domain {name} has folders that are no classes of the training data, so their images are "
        f"unlabelled: {', '.join(some)}{' …' if len(unknown) > _SHOWN else ''}; rename those that are classes"
    )
