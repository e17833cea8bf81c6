"""At which sizes images are kept: what each encoder wants, within what the data set holds."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low
from typing import NamedTuple

from deepclust.config import Auto, Config, Flag, Name, Pixels, config
from deepclust.images import decode
from deepclust.images.source import Source
from tasks.shared.outputs import layout, read

_LEAST, _MOST_AUTOMATIC = 8, 64


@config
class Wanted(Config):
    """What the stage `sizes` says of an encoder."""

    image_size: Pixels | Auto
    """Side of its images, in pixels."""
    enlarged: Flag
    """Whether smaller images are brought to it before they are kept."""


class Sizes(NamedTuple):
    """Sides of images, in pixels.

    Attributes:
        held: The data set's own, or the median shorter one of its training images, at least 8.
        own: What `auto` stands for: the same, where images differ at most 64.
        kept: Of each encoder.
        notes: What the user should know of them.
    """

    held: int
    own: int
    kept: dict[str, int]
    notes: list[str]


def settle(source: Source, seen: Mapping[int, decode.Inspected]) -> Sizes:
    """Decide on each encoder's size by what it wants and what the data set holds, and by nothing else.

    Args:
        source: The images.
        seen: Those that can be read. Images that the source states to be test images do not count.

    Raises:
        DataError: If the output of the stage `sizes` is missing or damaged.
    """
    if source.image_size is not None:
        held = own = source.image_size
    else:
        lengths = [
            min(one.width, one.height)
            for index, one in seen.items()
            if source.sides is None or source.sides[index] == "train"
        ]
        held = max(median_low(lengths), _LEAST) if lengths else _MOST_AUTOMATIC
        own = min(held, _MOST_AUTOMATIC)
    kept: dict[str, int] = {}
    notes: list[str] = []
    encoders = read.record(layout.SIZES, {"encoders": dict[Name, Wanted]})["encoders"]
    for encoder, wanted in ((name, Wanted(**values)) for name, values in encoders.items()):
        if wanted.image_size == "auto":
            kept[encoder] = own
            continue
        kept[encoder] = wanted.image_size if wanted.enlarged else min(wanted.image_size, held)
        if wanted.enlarged and wanted.image_size > held:
            notes.append(f"{encoder} is to have images of {wanted.image_size} px, which are enlarged: they hold {held}")
    return Sizes(held, own, kept, notes)
