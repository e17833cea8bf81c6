"""The images of domains as shifts; see `deepclust.datasets.domains`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepclust.adaptation import shifts
from deepclust.datasets import domains
from deepclust.errors import ConfigError, DataError
from deepclust.images import decode, find
from deepclust.images.reading import Reading
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout, prepared, read


def reading(encoder: str) -> Reading:
    """How files became the images that an encoder gets. Raises: DataError if that is missing or damaged."""
    try:
        return Reading.of(prepared.statistics(encoder))
    except ConfigError as error:
        path = layout.statistics(encoder)
        raise read.damaged(path, f"{path} is damaged: {error}") from error


def load(
    root: Path,
    work: Path,
    *,
    classes: list[str],
    reading: Reading,
    image_size: int,
    channels: int,
    count: int,
    max_pixels: int,
    follow_links: bool,
    seed: int,
) -> list[shifts.Shift]:
    """Read the images of each domain, at most `count`, a seeded choice in a seeded order.

    Args:
        root: The folder of domains, which may be empty.
        work: An empty folder, where the decoded images are kept.
        classes: Names of the classifier's labels; empty if the training data have none.
        reading: How files become pixels.
        image_size: Side of the images, in pixels.
        channels: Of the images.
        count: Most images of a domain.
        max_pixels: See `decode.read_image`.
        follow_links: See `find.images`.
        seed: Of the choice.

    Raises:
        DataError: If there is no such folder, it is not one of domains, or no image of a domain can be read.
    """
    files = find.images(root, follow_links)
    found, notes = domains.load(root, files, classes)
    notes = [*(f"warning: {warning}" for warning in files.warnings_of_stage()), *notes]
    for note in [*(f"skipped {item['path']}: {item['reason']}" for item in files.skipped), *notes]:
        say(note)
    shape: dict[str, Any] = {"image_size": image_size, "channels": channels}

    def decoded(domain: domains.Domain) -> shifts.Shift:
        kept: list[int] = []

        def readable() -> Iterator[NDArray[np.uint8]]:
            for row in shifts.choose(domain.labels, count=count, seed=seed).tolist():
                try:
                    image = decode.read_image(root / domain.paths[row], reading, max_pixels=max_pixels, **shape)
                except DataError as error:
                    say(f"skipped {domain.paths[row]}: {error}")
                else:
                    kept.append(row)
                    yield image[None]
            if not kept:
                raise DataError(
                    f"expected images in the domain {root / domain.name}, could read none of {len(domain.paths)}; "
                    "mend or remove it"
                )

        images = shifts.keep(readable(), (image_size, image_size, channels), work / domain.name)
        return shifts.Shift(domain.name, 0, images, domain.labels[kept], [domain.paths[row] for row in kept])

    return [decoded(domain) for domain in found]
