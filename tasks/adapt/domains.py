"""Domains: folders `domain/class/images` beside the data, met by an adapter as they are.

Class folders are those of the training data, by name. A domain of loose images, or of one folder `unlabelled`, has no
labels. Where the training data have no classes, a domain's own folders are numbered: they tell how clusters fit.
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
from deepclust.images.folders import UNLABELLED


def load(
    root: Path, work: Path, *, classes: list[str], statistics: dict[str, Any], count: int, max_pixels: int, seed: int
) -> list[shifts.Shift]:
    """Read the images of each domain, at most `count`, a seeded choice in a seeded order.

    Args:
        root: The folder of domains; one without any images has none.
        work: An empty folder, where the decoded images are kept.
        classes: Names of the classifier's labels; empty if the training data have none.
        statistics: What `prepare` says of size, channels and resizing.
        count: Most images of a domain.
        max_pixels: See `decode.read_image`.
        seed: Of the choice.

    Raises:
        DataError: If there is no such folder, images lie beside the domains, a domain is called as the images
            without a shift are, a class is unknown, or no image of a domain can be read.
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
    return [
        _read(
            root,
            work / name,
            paths,
            classes or _folders(name, paths),
            statistics,
            count=count,
            max_pixels=max_pixels,
            seed=seed,
        )
        for name, paths in sorted(domains.items())
    ]


def _read(
    root: Path,
    file: Path,
    paths: list[str],
    classes: list[str],
    statistics: dict[str, Any],
    *,
    count: int,
    max_pixels: int,
    seed: int,
) -> shifts.Shift:
    labels = np.array([_label(path, classes) for path in paths], np.int64)
    size, channels = statistics["image_size"], statistics["channels"]
    kept: list[int] = []

    def readable() -> Iterator[NDArray[np.uint8]]:
        for row in shifts.choose(labels, count=count, seed=seed).tolist():
            try:
                image = decode.read_image(
                    root / paths[row],
                    image_size=size,
                    channels=channels,
                    resize=statistics["resize"],
                    max_pixels=max_pixels,
                )
            except DataError as error:
                print(f"skipped {paths[row]}: {error}", flush=True)
            else:
                kept.append(row)
                yield image[None]
        if not kept:
            raise DataError(
                f"expected images in the domain {root / file.name}, could read none of {len(paths)}; mend or remove it"
            )

    images = shifts.keep(readable(), (size, size, channels), file)
    return shifts.Shift(file.name, 0, images, labels[kept], [paths[row] for row in kept])


def _folders(domain: str, paths: list[str]) -> list[str]:
    """Class folders of a domain, sorted, where the training data have no classes that could name them."""
    parts = [path.split("/") for path in paths]
    found = sorted({inside[1] for inside in parts if not _unlabelled(inside)})
    if found:
        print(
            f"{domain}: the training data have no classes, so the domain's own {len(found)} class folders are "
            "numbered; they tell how clusters fit, and nothing else",
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
