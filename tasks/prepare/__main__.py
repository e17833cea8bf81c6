"""Write a named data set, or a folder of images, as arrays that every other stage reads.

python -m tasks.prepare

Several processes each inspect and decode a share of the images, and need a common folder. The main one decides and
writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepclust import files
from deepclust.config import as_dict
from deepclust.datasets import domains, sources, stacks, subset
from deepclust.errors import DataError
from deepclust.images import find as finding
from deepclust.images import folders
from deepclust.images.source import Source
from tasks.prepare import arrays, decoding, shares, sides
from tasks.shared.operations import last_preparation
from tasks.shared.operations.params.schema import Data
from tasks.shared.operations.processes import launcher
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout, stage


def main() -> None:
    """Run the stage."""
    with stage.running("prepare") as here:
        data = here.params.data
        source = find_alike(data, here.params.seed)
        with launcher.together():
            if launcher.is_main():
                check_domains(Path(here.params.adapt.domains), data.follow_links, source.classes)
        seen, failed = decoding.inspect(source, data)
        plan = decoding.settle(source, data, seen)
        decoded = decoding.read(here.folder, source, plan, seen, failed)
        with launcher.together() as heartbeat:
            if launcher.is_main():
                write(here, source, plan, decoded, heartbeat)


def write(
    here: stage.Here,
    source: Source,
    plan: decoding.Plan,
    decoded: decoding.Decoded,
    heartbeat: Callable[[], None],
) -> None:
    """Settle the sides, and write images, labels, descriptions and metrics. Raises: DataError."""
    data = here.params.data
    for line in decoding.about_skipped(decoded.skipped):
        say(line)
    check(source, decoded, data.max_skipped)
    settled = sides.settle(source, decoded.indices, decoded.ids, decoded.sums, data, here.params.seed)
    labels = write_items(here.folder, source, decoded, settled)
    files.write_array(here.folder / "train" / "heldout.npy", settled.heldout)
    moved = last_preparation.warning(here.folder)
    for warning in [*settled.warnings, *([moved] if moved else [])]:
        say(f"warning: {warning}")
    # Where `auto` finds no colour in a source that might have some, one of three equal channels is kept.
    is_grey = data.colour == "auto" and source.channels is None and not decoded.has_colour
    channels = 1 if is_grey else plan.channels
    reading = as_dict(plan.reading)
    held = plan.sizes.held
    described = {
        size: write_images(here.folder, size, parts, settled, channels, heartbeat) | {"held": held}
        for size, parts in decoded.files.items()
    }
    for encoder, size in plan.sizes.kept.items():
        # What an encoder has to know of its images: all that decides pretraining besides its parameters.
        text = stage.json_text({"image_size": size, "channels": channels} | reading | described[size])
        stage.write_text(here.folder / layout.statistics(encoder).relative_to(layout.PREPARED), text)
    images = {split: len(labels[split]) for split in layout.SPLITS}
    labelled = {split: int((labels[split] >= 0).sum()) for split in layout.SPLITS}
    # What a person or the report has to know of the data, whatever encoders there are.
    meta: dict[str, Any] = {"source": source.name, "classes": source.classes}
    meta |= {"held": held, "channels": channels} | reading
    meta |= {split: {"images": images[split], "labelled": labelled[split]} for split in layout.SPLITS}
    meta["content_hash"] = content_hash(decoded, settled, labels, source.classes)
    meta |= {"skipped": decoded.skipped, "ignored": source.ignored}
    meta |= {"left_out": settled.left_out, "warnings": source.warnings + plan.warnings + settled.warnings}
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


def find_alike(data: Data, seed: int) -> Source:
    """The source, of which all processes have to find the same images. Raises: DataError."""
    with launcher.together():
        source = find(data, seed) if launcher.is_main() or data.source == "folder" else None
    with launcher.together():  # a named data set that the main process has put into this machine's cache
        source = source or find(data, seed)
    listed = hashlib.sha256(json.dumps([source.paths, source.labels.tolist()]).encode()).hexdigest()
    if not shares.equal(listed):
        raise DataError(
            f"expected all processes to find the same images in {source.name}, they do not; let all machines see the "
            "same folder, with no file added meanwhile"
        )
    return source


def find(data: Data, seed: int) -> Source:
    """The images that the parameters name, with the source's warnings printed. Raises: DataError."""
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
    if data.images == "all":
        return source
    kept = subset.drawn(source, data.images, seed=seed)
    if kept is not source:
        say(f"{source.name}: {len(kept.paths)} of them are drawn (data.images)")
    return kept


def check_domains(root: Path, follow_links: bool, classes: list[str]) -> None:
    """Say what the stage `adapt` will make of the domains, before anything is trained. Raises: DataError."""
    for note in domains.load(root, finding.images(root, follow_links), classes)[1]:
        say(note)


def check(source: Source, decoded: decoding.Decoded, max_skipped: float) -> None:
    """Raise DataError if too few images could be read."""
    skipped = decoded.skipped
    total = len(decoded.indices) + len(skipped)
    if len(skipped) > max_skipped * total:
        raise DataError(
            f"expected at most {max_skipped:g} of the files to be unreadable (data.max_skipped), got {len(skipped)} of "
            f"{total} in {source.name}, first {skipped[0]['path']}: {skipped[0]['reason']}; mend or remove them, or "
            f"raise data.max_skipped"
        )


def write_items(
    folder: Path, source: Source, decoded: decoding.Decoded, settled: sides.Sides
) -> dict[str, NDArray[np.int64]]:
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


def write_images(
    folder: Path,
    size: int,
    parts: Sequence[Path],
    settled: sides.Sides,
    channels: int,
    heartbeat: Callable[[], None],
) -> dict[str, Any]:
    """Write the images of each split at a size, and remove the files of all; `mean`, `std`, hashes of `images`."""
    place = folder / layout.images(size).relative_to(layout.PREPARED)
    place.mkdir(parents=True)
    hashes = {}
    for split, rows in settled.rows.items():
        path = place / f"{split}.npy"
        arrays.copy(parts, rows, path, channels=channels, heartbeat=heartbeat)
        with path.open("rb") as file:
            hashes[split] = hashlib.file_digest(file, "sha256").hexdigest()
    for part in parts:
        part.unlink()
    mean, std = arrays.mean_and_std(place / "train.npy")
    return {"mean": mean, "std": std, "images": hashes}


def content_hash(
    decoded: decoding.Decoded, settled: sides.Sides, labels: dict[str, NDArray[np.int64]], classes: list[str]
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
