"""Write a named data set, or a folder of images, as arrays that every other stage reads.

python -m tasks.prepare
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepclust import files
from deepclust.config import as_dict
from deepclust.datasets import domains, sources, stacks
from deepclust.errors import DataError
from deepclust.images import decode, depth, folders, npy
from deepclust.images import find as finding
from deepclust.images.reading import Reading
from deepclust.images.source import Source
from tasks.prepare import arrays, sides
from tasks.shared.operations import last_preparation
from tasks.shared.operations.params.schema import Data
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout, stage

AUTO_SIZES = (8, 64)  # pixels: from and to
_INSPECTED_AT_ONCE = 64
_REASONS_SHOWN = 20


class Decoded(NamedTuple):
    """All images of a source that can be read.

    Attributes:
        file: (M, H, W, C) uint8, with three channels if it was not known whether they have colour.
        indices: (M,) their numbers in the source.
        ids: M.
        sums: A hash of each one's pixels.
        reading: How they were read.
        skipped: `path` and `reason` of all others.
        warnings: What the user should know of how they were read.
    """

    file: Path
    indices: NDArray[np.int64]
    ids: list[str]
    sums: list[bytes]
    reading: Reading
    skipped: list[dict[str, str]]
    warnings: list[str]


def main() -> None:
    """Run the stage."""
    with stage.running("prepare") as here:
        data, seed = here.params.data, here.params.seed
        source = find(data)
        check_domains(Path(here.params.adapt.domains), data.follow_links, source.classes)
        decoded = read(here.folder, source, data)
        check(source, decoded, data.max_skipped)
        settled = sides.settle(source, decoded.indices, decoded.ids, decoded.sums, data, seed)
        labels = write(here.folder, source, decoded, settled, data)
        files.write_array(here.folder / "train" / "heldout.npy", settled.heldout)
        moved = last_preparation.warning(here.folder)
        for warning in [*settled.warnings, *([moved] if moved else [])]:
            say(f"warning: {warning}")
        train = here.folder / "train" / "images.npy"
        _, image_size, _, channels = np.load(train, mmap_mode="r", allow_pickle=False).shape
        shape: dict[str, Any] = {"image_size": image_size, "channels": channels} | as_dict(decoded.reading)
        mean, std = arrays.mean_and_std(train)
        # What an encoder has to know of its images: all that decides pretraining besides the images themselves.
        statistics = stage.json_text(shape | {"mean": mean, "std": std})
        stage.write_text(here.folder / layout.STATISTICS.name, statistics)
        images = {split: len(labels[split]) for split in layout.SPLITS}
        labelled = {split: int((labels[split] >= 0).sum()) for split in layout.SPLITS}
        # What a person or the report has to know of the data.
        meta: dict[str, Any] = {"source": source.name, "classes": source.classes, **shape}
        meta |= {split: {"images": images[split], "labelled": labelled[split]} for split in layout.SPLITS}
        meta["content_hash"] = content_hash(here.folder, source.classes)
        meta |= {"skipped": decoded.skipped, "ignored": source.ignored}
        meta |= {"left_out": settled.left_out, "warnings": source.warnings + decoded.warnings + settled.warnings}
        stage.write_text(here.folder / layout.META.name, stage.json_text(meta))
        here.metrics(
            {f"{split}_images": count for split, count in images.items()}
            | {f"{split}_labelled": count for split, count in labelled.items()}
            | {"classes": len(source.classes), "skipped": len(decoded.skipped)}
        )
        named = f" ({', '.join(source.classes[:5])}{' …' if len(source.classes) > 5 else ''})" if source.classes else ""
        say(
            f"{source.name}: {images['train']} training and {images['test']} test images of {image_size} x "
            f"{image_size} x {channels}, {len(source.classes)} classes{named}, {len(settled.heldout)} labelled images "
            f"held out; {len(decoded.skipped)} skipped, {source.ignored} other files ignored"
        )


def find(data: Data) -> Source:
    """The source that the parameters name, with its warnings printed. Raises: DataError."""
    source: Source
    if data.source == "folder":
        files = finding.images(Path(data.folder), data.follow_links)
        if files.stacks:
            source = stacks.load(data.folder, files)
        else:
            source = folders.load(data.folder, files, max_pixels=data.max_pixels)
    else:
        source = sources.load(data.source)
    for warning in source.warnings:
        say(f"warning: {warning}")
    say(f"{source.name}: {len(source.paths)} images")
    return source


def check_domains(root: Path, follow_links: bool, classes: list[str]) -> None:
    """Say what the stage `adapt` will make of the domains, before anything is trained. Raises: DataError."""
    for note in domains.load(root, finding.images(root, follow_links), classes)[1]:
        say(note)


def read(folder: Path, source: Source, data: Data) -> Decoded:
    """Inspect all images, settle how they are read, and decode each once into a file in `folder`."""
    how: dict[str, Any] = {name: getattr(data, name) for name in ("resize", "background", "pages", "bands")}
    inspect = partial(source.inspect, reading=Reading(**how))
    seen: dict[int, decode.Inspected] = {}
    failed: dict[int, str] = {}
    everything = range(len(source.paths))
    for index, found in arrays.each(inspect, everything, step=_INSPECTED_AT_ONCE, what="inspected"):
        if isinstance(found, str):
            failed[index] = found
        else:
            seen[index] = found
    image_size = own_size(source, seen) if data.image_size == "auto" else data.image_size
    measured = [one.measured for one in seen.values() if one.measured]
    reading = Reading(**how, white=depth.settle(measured, data.white))
    for name, (black, white) in reading.white.items():
        say(f"{source.name}: of {name} pixels, {black:.10g} is black and {white:.10g} is white (data.white)")
    for warning in (warnings := doubts(seen.values(), measured, reading)):
        say(f"warning: {warning}")
    channels = {"grey": 1, "rgb": 3, "auto": source.channels or 3}[data.colour]
    shape = (image_size, image_size, channels)

    def pixels(index: int) -> tuple[NDArray[np.uint8], bytes]:
        image = source.read(index, reading, image_size=image_size, channels=channels)
        return image, hashlib.sha256(np.ascontiguousarray(image).data).digest()

    file = folder / ".decoded.npy"
    sums: dict[int, bytes] = {}
    with npy.RowFile(file, shape, np.uint8) as rows:
        for index, result in arrays.each(pixels, list(seen), step=arrays.chunk(shape), what="decoded"):
            if isinstance(result, str):
                failed[index] = result
            else:
                rows.append(result[0][None])
                sums[index] = result[1]
    skipped = [*source.skipped, *({"path": source.paths[index], "reason": failed[index]} for index in sorted(failed))]
    for line in about_skipped(skipped):
        say(line)
    ids = [seen[index].sha256 for index in sums]
    return Decoded(file, np.array(list(sums), np.int64), ids, list(sums.values()), reading, skipped, warnings)


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


def own_size(source: Source, seen: dict[int, decode.Inspected]) -> int:
    """The source's own side in pixels: the median shorter one within bounds, where its images differ.

    Images that the source states to be test images do not count.
    """
    if source.image_size is not None:
        return source.image_size
    lengths = [
        min(one.width, one.height)
        for index, one in seen.items()
        if source.sides is None or source.sides[index] == "train"
    ]
    low, high = AUTO_SIZES
    return min(max(median_low(lengths), low), high) if lengths else high


def check(source: Source, decoded: Decoded, max_skipped: float) -> None:
    """Raise DataError if too few images could be read."""
    skipped = decoded.skipped
    total = len(decoded.indices) + len(skipped)
    if len(skipped) > max_skipped * total:
        raise DataError(
            f"expected at most {max_skipped:g} of the files to be unreadable (data.max_skipped), got {len(skipped)} of "
            f"{total} in {source.name}, first {skipped[0]['path']}: {skipped[0]['reason']}; mend or remove them, or "
            f"raise data.max_skipped"
        )


def write(
    folder: Path, source: Source, decoded: Decoded, settled: sides.Sides, data: Data
) -> dict[str, NDArray[np.int64]]:
    """Write images, labels and items of each split; its labels.

    Where `auto` finds no colour in a source that might have some, one of its three equal channels is kept.
    """
    channels: int = np.load(decoded.file, mmap_mode="r", allow_pickle=False).shape[3]
    if data.colour == "auto" and source.channels is None and not arrays.has_colour(decoded.file):
        channels = 1
    labels = {}
    for split, rows in settled.rows.items():
        place = folder / split
        place.mkdir()
        arrays.copy(decoded.file, rows, place / "images.npy", channels=channels)
        numbers = labels[split] = source.labels[decoded.indices[rows]]
        files.write_array(place / "labels.npy", numbers)
        items = (
            {
                "index": index,
                "path": source.paths[decoded.indices[row]],
                "label": source.classes[number] if number >= 0 else "",
                "id": decoded.ids[row],
            }
            for index, (row, number) in enumerate(zip(rows.tolist(), numbers.tolist(), strict=True))
        )
        stage.write_text(place / "items.csv", stage.table(items, ["index", "path", "label", "id"]))
    decoded.file.unlink()
    return labels


def content_hash(folder: Path, classes: list[str]) -> str:
    """SHA-256 over images, labels and classes, but not the names of files."""
    sum_ = hashlib.sha256()
    for split in layout.SPLITS:
        for name in ("images.npy", "labels.npy"):
            arrays.add_to_hash(sum_, folder / split / name)
    sum_.update(json.dumps(classes).encode())
    return sum_.hexdigest()


if __name__ == "__main__":
    main()
