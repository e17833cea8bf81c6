"""Each image inspected, then decoded at every size that is kept, by several processes or by one.

What is settled in between follows from all images. The main process settles it, and speaks and is heard by all.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepclust.config import as_dict
from deepclust.images import decode, depth, npy
from deepclust.images.reading import Reading
from deepclust.images.source import Source
from tasks.prepare import arrays, image_sizes, shares
from tasks.shared.operations.params.schema import Data
from tasks.shared.operations.processes import launcher
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout

_INSPECTED_AT_ONCE = 64
_REASONS_SHOWN = 20


class Plan(NamedTuple):
    """How images are decoded.

    Attributes:
        sizes: At which sides.
        channels: Of the pixels; three if it is not known whether the images have colour.
        reading: How files become pixels.
        warnings: What the user should know of it.
    """

    sizes: image_sizes.Sizes
    channels: int
    reading: Reading
    warnings: list[str]


class Decoded(NamedTuple):
    """All images of a source that can be read.

    Attributes:
        files: Of each size, one of each process, whose rows one after the other are (M, size, size, C) uint8.
        indices: (M,) their numbers in the source.
        ids: M.
        sums: A hash of each one's pixels at the data set's own size, whatever sizes are kept.
        has_colour: Whether any of them has colour at that size.
        skipped: `path` and `reason` of all others.
    """

    files: dict[int, list[Path]]
    indices: NDArray[np.int64]
    ids: list[str]
    sums: list[bytes]
    has_colour: bool
    skipped: list[dict[str, str]]


def inspect(source: Source, data: Data) -> tuple[dict[int, decode.Inspected], dict[int, str]]:
    """What is known of each image without its pixels, and why others can not be read, by their numbers.

    Processes other than the main one get only their own share.
    """
    do = partial(source.inspect, reading=Reading(**_stated(data)))
    own = shares.mine(len(source.paths))
    with launcher.together() as heartbeat:
        found: list[decode.Inspected | str] = []
        for _, one in arrays.each(do, own, step=_INSPECTED_AT_ONCE, what="inspected"):
            found.append(one)
            heartbeat()
    indices = range(len(source.paths)) if launcher.is_main() else own
    results = dict(zip(indices, shares.gathered(found, _inspected), strict=True))
    seen = {index: one for index, one in results.items() if not isinstance(one, str)}
    return seen, {index: one for index, one in results.items() if isinstance(one, str)}


def _inspected(value: Any) -> decode.Inspected | str:
    if isinstance(value, str):
        return value
    sha256, width, height, measured, *others = value
    if measured:
        name, low, high, stated = measured
        measured = depth.Measured(name, low, high, tuple(stated))
    return decode.Inspected(sha256, width, height, measured, *others)


def _stated(data: Data) -> dict[str, Any]:
    return {name: getattr(data, name) for name in ("resize", "background", "pages", "bands")}


def settle(source: Source, data: Data, seen: dict[int, decode.Inspected]) -> Plan:
    """Settle how images are decoded by what is known of all of them, and say so. Raises: DataError."""
    with launcher.together():
        plan = _plan(source, data, seen) if launcher.is_main() else None
    # As the configuration that is stored with the images, which JSON holds.
    sizes, channels, reading, warnings = shares.of_main(plan and (*plan[:2], as_dict(plan.reading), plan.warnings))
    return Plan(image_sizes.Sizes(*sizes), channels, Reading.of(reading), warnings)


def _plan(source: Source, data: Data, seen: dict[int, decode.Inspected]) -> Plan:
    sizes = image_sizes.settle(source, seen)
    measured = [one.measured for one in seen.values() if one.measured]
    reading = Reading(**_stated(data), white=depth.settle(measured, data.white))
    for note in sizes.notes:
        say(f"warning: {note}")
    for name, (black, white) in reading.white.items():
        say(f"{source.name}: of {name} pixels, {black:.10g} is black and {white:.10g} is white (data.white)")
    for warning in (warnings := doubts(seen.values(), measured, reading)):
        say(f"warning: {warning}")
    channels = {"grey": 1, "rgb": 3, "auto": source.channels or 3}[data.colour]
    return Plan(sizes, channels, reading, warnings)


def read(
    folder: Path, source: Source, plan: Plan, seen: dict[int, decode.Inspected], failed: dict[int, str]
) -> Decoded:
    """Decode each image, at every size, into a file of that size and of this process in `folder`.

    Processes other than the main one get only their own share of the result.
    """
    kept = sorted(set(plan.sizes.kept.values()))
    wanted = [plan.sizes.own, *kept]

    def pixels(index: int) -> tuple[list[NDArray[np.uint8]], tuple[str, bool]]:
        images = source.read(index, plan.reading, image_sizes=wanted, channels=plan.channels)
        own = np.ascontiguousarray(images[0])
        return images[1:], (hashlib.sha256(own.data).hexdigest(), bool((own != own[..., :1]).any()))

    found: list[tuple[str, bool] | str] = []
    with launcher.together() as heartbeat, ExitStack() as stack:
        rows = [
            stack.enter_context(npy.RowFile(_part(folder, size, shares.rank()), (size, size, plan.channels), np.uint8))
            for size in kept
        ]
        step = arrays.chunk((max(kept), max(kept), plan.channels))
        own = [index for index in shares.mine(len(source.paths)) if index in seen]
        for _, result in arrays.each(pixels, own, step=step, what="decoded"):
            if isinstance(result, str):
                found.append(result)
            else:
                found.append(result[1])
                for images, image in zip(rows, result[0], strict=True):
                    images.append(image[None])
            heartbeat()
    results = dict(zip(seen, shares.gathered(found, lambda value: value), strict=True))
    good = {index: one for index, one in results.items() if not isinstance(one, str)}
    failed = failed | {index: one for index, one in results.items() if isinstance(one, str)}
    return Decoded(
        files={size: [_part(folder, size, rank) for rank in range(shares.processes())] for size in kept},
        indices=np.array(list(good), np.int64),
        ids=[seen[index].sha256 for index in good],
        sums=[bytes.fromhex(sum_) for sum_, _ in good.values()],
        has_colour=any(has_colour for _, has_colour in good.values()),
        skipped=[
            *source.skipped,
            *({"path": source.paths[index], "reason": failed[index]} for index in sorted(failed)),
        ],
    )


def _part(folder: Path, size: int, rank: int) -> Path:
    return folder / f".decoded-{size}-{rank}.npy"


def doubts(images: Collection[decode.Inspected], measured: Collection[depth.Measured], reading: Reading) -> list[str]:
    """Warnings of few grey levels, of pages that are not read, and of depths whose white is settled apart."""
    warnings = depth.few_levels(measured, reading.white)
    several = sum(one.has_pages for one in images)
    if several and reading.pages == "first":
        have = "has" if several == 1 else "have"
        warnings.append(f"{several} of {len(images)} images {have} several pages; the first is read (data.pages)")
    depths = Counter(one.depth for one in images)
    if len(depths) > 1:
        named = ", ".join(f"{count} of {name}" for name, count in sorted(depths.items()))
        warnings.append(
            f"images of several depths, whose brightness may not be comparable: {named}; convert all to one depth"
        )
    return warnings


def about_skipped(skipped: list[dict[str, str]]) -> list[str]:
    """A line for each reason, with the first file that it holds for; numbers in it make no other reason."""
    alike: dict[str, list[dict[str, str]]] = {}
    for item in skipped:
        alike.setdefault(re.sub(r"\d+", "0", item["reason"]), []).append(item)
    shown = list(alike.values())[:_REASONS_SHOWN]
    lines = [
        f"skipped {'' if len(items) == 1 else f'{len(items)} files, first '}{items[0]['path']}: {items[0]['reason']}"
        for items in shown
    ]
    if more := len(skipped) - sum(map(len, shown)):
        lines.append(f"skipped {more} more files for other reasons; {layout.META} lists all")
    return lines
