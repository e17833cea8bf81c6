"""Write a named data set, or a folder of images, as arrays that every other stage reads.

python -m tasks.prepare
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from functools import partial
from pathlib import Path
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
from tasks.prepare import arrays, image_sizes, sides
from tasks.shared.operations import last_preparation
from tasks.shared.operations.params.schema import Data
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout, stage

_INSPECTED_AT_ONCE = 64
_REASONS_SHOWN = 20


class Decoded(NamedTuple):
    """All images of a source that can be read.

    Attributes:
        files: Of each size, (M, size, size, C) uint8, with three channels if it was not known whether they have colour.
        indices: (M,) their numbers in the source.
        ids: M.
        sums: A hash of each one's pixels at the data set's own size, whatever sizes are kept.
        has_colour: Whether any of them has colour at that size.
        reading: How they were read.
        skipped: `path` and `reason` of all others.
        warnings: What the user should know of how they were read.
    """

    files: dict[int, Path]
    indices: NDArray[np.int64]
    ids: list[str]
    sums: list[bytes]
    has_colour: bool
    reading: Reading
    skipped: list[dict[str, str]]
    warnings: list[str]


def main() -> None:
    """Run the stage."""
    with stage.running("prepare") as here:
        data, seed = here.params.data, here.params.seed
        source = find(data)
        check_domains(Path(here.params.adapt.domains), data.follow_links, source.classes)
        seen, failed = inspect(source, data)
        sizes = image_sizes.settle(source, seen)
        for note in sizes.notes:
            say(f"warning: {note}")
        decoded = read(here.folder, source, data, sizes, seen, failed)
        check(source, decoded, data.max_skipped)
        settled = sides.settle(source, decoded.indices, decoded.ids, decoded.sums, data, seed)
        labels = write_items(here.folder, source, decoded, settled)
        files.write_array(here.folder / "train" / "heldout.npy", settled.heldout)
        moved = last_preparation.warning(here.folder)
        for warning in [*settled.warnings, *([moved] if moved else [])]:
            say(f"warning: {warning}")
        # Where `auto` finds no colour in a source that might have some, one of three equal channels is kept.
        is_grey = data.colour == "auto" and source.channels is None and not decoded.has_colour
        channels = 1 if is_grey else {"grey": 1, "rgb": 3, "auto": source.channels or 3}[data.colour]
        reading = as_dict(decoded.reading)
        described = {
            size: write_images(here.folder, size, file, settled, channels) | {"held": sizes.held}
            for size, file in decoded.files.items()
        }
        for encoder, size in sizes.kept.items():
            # What an encoder has to know of its images: all that decides pretraining besides its parameters.
            text = stage.json_text({"image_size": size, "channels": channels} | reading | described[size])
            stage.write_text(here.folder / layout.statistics(encoder).relative_to(layout.PREPARED), text)
        images = {split: len(labels[split]) for split in layout.SPLITS}
        labelled = {split: int((labels[split] >= 0).sum()) for split in layout.SPLITS}
        # What a person or the report has to know of the data, whatever encoders there are.
        meta: dict[str, Any] = {"source": source.name, "classes": source.classes}
        meta |= {"held": sizes.held, "channels": channels} | reading
        meta |= {split: {"images": images[split], "labelled": labelled[split]} for split in layout.SPLITS}
        meta["content_hash"] = content_hash(decoded, settled, labels, source.classes)
        meta |= {"skipped": decoded.skipped, "ignored": source.ignored}
        meta |= {"left_out": settled.left_out, "warnings": source.warnings + decoded.warnings + settled.warnings}
        stage.write_text(here.folder / layout.META.name, stage.json_text(meta))
        here.metrics(
            {f"{split}_images": count for split, count in images.items()}
            | {f"{split}_labelled": count for split, count in labelled.items()}
            | {"classes": len(source.classes), "skipped": len(decoded.skipped)}
        )
        named = f" ({', '.join(source.classes[:5])}{' …' if len(source.classes) > 5 else ''})" if source.classes else ""
        kept = " and ".join(f"{size} x {size} x {channels}" for size in described)
        say(
            f"{source.name}: {images['train']} training and {images['test']} test images of {kept}, "
            f"{len(source.classes)} classes{named}, {len(settled.heldout)} labelled images "
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


def inspect(source: Source, data: Data) -> tuple[dict[int, decode.Inspected], dict[int, str]]:
    """What is known of each image without its pixels, and why others can not be read, by their numbers."""
    do = partial(source.inspect, reading=Reading(**_stated(data)))
    seen: dict[int, decode.Inspected] = {}
    failed: dict[int, str] = {}
    for index, found in arrays.each(do, range(len(source.paths)), step=_INSPECTED_AT_ONCE, what="inspected"):
        if isinstance(found, str):
            failed[index] = found
        else:
            seen[index] = found
    return seen, failed


def _stated(data: Data) -> dict[str, Any]:
    return {name: getattr(data, name) for name in ("resize", "background", "pages", "bands")}


def read(
    folder: Path,
    source: Source,
    data: Data,
    sizes: image_sizes.Sizes,
    seen: dict[int, decode.Inspected],
    failed: dict[int, str],
) -> Decoded:
    """Settle how images are read, and decode each, at every size, into a file of that size in `folder`."""
    failed = dict(failed)
    measured = [one.measured for one in seen.values() if one.measured]
    reading = Reading(**_stated(data), white=depth.settle(measured, data.white))
    for name, (black, white) in reading.white.items():
        say(f"{source.name}: of {name} pixels, {black:.10g} is black and {white:.10g} is white (data.white)")
    for warning in (warnings := doubts(seen.values(), measured, reading)):
        say(f"warning: {warning}")
    channels = {"grey": 1, "rgb": 3, "auto": source.channels or 3}[data.colour]
    kept = sorted(set(sizes.kept.values()))

    def pixels(index: int) -> tuple[list[NDArray[np.uint8]], bytes, bool]:
        images = source.read(index, reading, image_sizes=[sizes.own, *kept], channels=channels)
        own = np.ascontiguousarray(images[0])
        return images[1:], hashlib.sha256(own.data).digest(), bool((own != own[..., :1]).any())

    written = {size: folder / f".decoded-{size}.npy" for size in kept}
    sums: dict[int, bytes] = {}
    has_colour = False
    with ExitStack() as stack:
        rows = [
            stack.enter_context(npy.RowFile(file, (size, size, channels), np.uint8)) for size, file in written.items()
        ]
        step = arrays.chunk((max(kept), max(kept), channels))
        for index, result in arrays.each(pixels, list(seen), step=step, what="decoded"):
            if isinstance(result, str):
                failed[index] = result
                continue
            for images, image in zip(rows, result[0], strict=True):
                images.append(image[None])
            sums[index] = result[1]
            has_colour |= result[2]
    skipped = [*source.skipped, *({"path": source.paths[index], "reason": failed[index]} for index in sorted(failed))]
    for line in about_skipped(skipped):
        say(line)
    ids = [seen[index].sha256 for index in sums]
    return Decoded(
        files=written,
        indices=np.array(list(sums), np.int64),
        ids=ids,
        sums=list(sums.values()),
        has_colour=has_colour,
        reading=reading,
        skipped=skipped,
        warnings=warnings,
    )


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


def write_items(folder: Path, source: Source, decoded: Decoded, settled: sides.Sides) -> dict[str, NDArray[np.int64]]:
    """Write labels and items of each split; its labels."""
    labels = {}
    for split, rows in settled.rows.items():
        place = folder / split
        place.mkdir()
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
    return labels


def write_images(folder: Path, size: int, decoded: Path, settled: sides.Sides, channels: int) -> dict[str, Any]:
    """Write the images of each split at a size, and remove the file of all; `mean`, `std`, and hashes of `images`."""
    place = folder / layout.images(size).relative_to(layout.PREPARED)
    place.mkdir(parents=True)
    hashes = {}
    for split, rows in settled.rows.items():
        path = place / f"{split}.npy"
        arrays.copy(decoded, rows, path, channels=channels)
        with path.open("rb") as file:
            hashes[split] = hashlib.file_digest(file, "sha256").hexdigest()
    decoded.unlink()
    mean, std = arrays.mean_and_std(place / "train.npy")
    return {"mean": mean, "std": std, "images": hashes}


def content_hash(
    decoded: Decoded, settled: sides.Sides, labels: dict[str, NDArray[np.int64]], classes: list[str]
) -> str:
    """SHA-256 over images, labels and classes, but neither the names of files nor the sizes that are kept."""
    sum_ = hashlib.sha256()
    for split, rows in settled.rows.items():
        for row in rows.tolist():
            sum_.update(decoded.sums[row])
        sum_.update(labels[split].tobytes())
    sum_.update(json.dumps(classes).encode())
    return sum_.hexdigest()


if __name__ == "__main__":
    main()
