"""Domains: folders `domain/class/images` with images that are shifted already, such as sketches.

Class folders have the names of the training data's classes. Images directly in a domain's folder or in its folder
`unlabelled` have no label. If the training data have no classes, a domain's own class folders measure the clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepclust.adaptation import shifts
from deepclust.errors import DataError
from deepclust.images import decode, find
from deepclust.images.labels import UNLABELLED


def load(
    root: Path, work: Path, *, classes: list[str], statistics: dict[str, Any], count: int, max_pixels: int, seed: int
) -> list[shifts.Shift]:
    """Read the images of each domain, at most `count`, a seeded choice in a seeded order.

    Args:
        root: The folder of domains, which may be empty.
        work: An empty folder, where the decoded images are kept.
        classes: Names of the classifier's labels; empty if the training data have none.
        statistics: Size, channels and resizing of the prepared images.
        count: Most images of a domain.
        max_pixels: See `decode.read_image`.
        seed: Of the choice.

    Raises:
        DataError: If there is no such folder, an image lies beside the domains, a domain has the name that stands for
            no shift, a class is unknown, or no image of a domain can be read.
    """
    files = find.images(root)
    domains: dict[str, list[str]] = {}
    for path in files.images:
        domain, _, rest = path.partition("/")
        if not rest:
            raise DataError(
                f"expected folders domain/class/images in {root}, got the image {path} beside them; move it into one"
            )
        domains.setdefault(domain, []).append(path)
    if shifts.CLEAN[0] in domains:
        raise DataError(
            f"expected other names of domains in {root} than {shifts.CLEAN[0]!r}, which is that of the test images "
            "without a shift; rename it"
        )
    for item in files.skipped:
        print(f"skipped {item['path']}: {item['reason']}", flush=True)
    reading = decode.Reading.of(statistics)
    shape: dict[str, Any] = {name: statistics[name] for name in ("image_size", "channels")}

    def read(name: str, paths: list[str]) -> shifts.Shift:
        known = classes or _folders(name, paths)
        labels = np.array([_label(path, known) for path in paths], np.int64)
        kept: list[int] = []

        def readable() -> Iterator[NDArray[np.uint8]]:
            for row in shifts.choose(labels, count=count, seed=seed).tolist():
                try:
                    image = decode.read_image(root / paths[row], reading, max_pixels=max_pixels, **shape)
                except DataError as error:
                    print(f"skipped {paths[row]}: {error}", flush=True)
                else:
                    kept.append(row)
                    yield image[None]
            if not kept:
                raise DataError(
                    f"expected images in the domain {root / name}, could read none of {len(paths)}; mend or remove it"
                )

        size = shape["image_size"]
        images = shifts.keep(readable(), (size, size, shape["channels"]), work / name)
        return shifts.Shift(name, 0, images, labels[kept], [paths[row] for row in kept])

    return [read(name, paths) for name, paths in sorted(domains.items())]


def _folders(domain: str, paths: list[str]) -> list[str]:
    """Class folders of a domain, sorted, for training data without classes."""
    parts = [path.split("/") for path in paths]
    found = sorted({inside[1] for inside in parts if not _unlabelled(inside)})
    if found:
        print(
            f"{domain}: the training data have no classes, so the domain's own {len(found)} class folders are "
            "numbered, to measure the clusters only",
            flush=True,
        )
    return found


def _unlabelled(parts: list[str]) -> bool:
    """Whether a path is domain/image or domain/unlabelled/image."""
    return len(parts) == 2 or parts[1].lower() in UNLABELLED


def _label(path: str, classes: list[str]) -> int:
    """Number of the class of domain/class/image; -1 for domain/image and domain/unlabelled/image."""
    parts = path.split("/")
    if _unlabelled(parts):
        return -1
    # A class may have a slash in its name, as FashionMNIST's T-shirt/top: then it is a folder within a folder.
    inside = "/".join(parts[1:])
    fitting = [name for name in classes if inside.startswith(f"{name}/")]
    if not fitting:
        known = ", ".join(classes[:5]) + (" …" if len(classes) > 5 else "")
        raise DataError(
            f"expected the class folders of a domain to be classes of the training data ({known}), got {parts[1]!r} in "
            f"{parts[0]}; rename it, or call it {UNLABELLED[0]}"
        )
    return classes.index(max(fitting, key=len))
