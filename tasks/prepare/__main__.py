"""Write a named data set, or a folder of images, as arrays that every other stage reads.

python -m tasks.prepare
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepclust.config import as_dict
from deepclust.datasets import sources
from deepclust.errors import DataError
from deepclust.images import decode, depth, folders, sampling
from tasks.prepare import arrays
from tasks.shared.operations.params.schema import Data
from tasks.shared.outputs import layout, stage

Source = sources.Named | folders.Folder


def main() -> None:
    """Run the stage."""
    with stage.running("prepare") as here:
        data, seed = here.params.data, here.params.seed
        source = find(data, seed)
        how = {name: getattr(data, name) for name in ("resize", "background", "pages", "bands")}
        own_size, measured = source.inspect(decode.Reading(**how))
        image_size = own_size if data.image_size == "auto" else data.image_size
        reading = decode.Reading(**how, white=depth.settle(measured, data.white))
        for name, (black, white) in reading.white.items():
            print(f"{source.name}: of {name} pixels, {black:g} is black and {white:g} is white", flush=True)
        kept, skipped = write_images(here.folder, source, reading, data, image_size)
        check(source, kept, skipped, data.max_skipped)
        channels = settle_channels(here.folder, source, data)
        labels = {split: source.labels[split][kept[split]] for split in layout.SPLITS}
        for split in layout.SPLITS:
            write_items(here.folder / split, source, split, kept[split], labels[split])
        # A share of each class's labelled training images; none of a class with one image.
        labelled_rows = np.flatnonzero(labels["train"] >= 0)
        drawn = np.random.default_rng([seed, 1])
        heldout = labelled_rows[sampling.stratified(labels["train"][labelled_rows], data.heldout_fraction, drawn)]
        np.save(here.folder / "train" / "heldout.npy", heldout)
        shape: dict[str, Any] = {"image_size": image_size, "channels": channels} | as_dict(reading)
        mean, std = arrays.mean_and_std(here.folder / "train" / "images.npy")
        # What an encoder has to know of its images: all that decides pretraining besides the images themselves.
        statistics = stage.json_text(shape | {"mean": mean, "std": std})
        stage.write_text(here.folder / layout.STATISTICS.name, statistics)
        images = {split: len(labels[split]) for split in layout.SPLITS}
        labelled = {split: int((labels[split] >= 0).sum()) for split in layout.SPLITS}
        # What a person or the report has to know of the data.
        meta: dict[str, Any] = {"source": source.name, "classes": source.classes, **shape}
        meta |= {split: {"images": images[split], "labelled": labelled[split]} for split in layout.SPLITS}
        meta["content_hash"] = content_hash(here.folder, source.classes)
        meta |= {"skipped": skipped, "ignored": source.ignored, "warnings": source.warnings}
        stage.write_text(here.folder / layout.META.name, stage.json_text(meta))
        here.metrics(
            {f"{split}_images": count for split, count in images.items()}
            | {f"{split}_labelled": count for split, count in labelled.items()}
            | {"classes": len(source.classes), "skipped": len(skipped)}
        )
        print(
            f"{source.name}: {len(labels['train'])} training and {len(labels['test'])} test images of {image_size} x "
            f"{image_size} x {channels}, {len(source.classes)} classes, {len(heldout)} labelled images held out; "
            f"{len(skipped)} skipped, {source.ignored} other files ignored",
            flush=True,
        )


def find(data: Data, seed: int) -> Source:
    """The source that the parameters name, with its warnings printed. Raises: DataError."""
    source: Source
    if data.source == "folder":
        source = folders.load(data.folder, test_fraction=data.test_fraction, seed=seed, max_pixels=data.max_pixels)
    else:
        source = sources.load(data.source)
    for warning in source.warnings:
        print(f"warning: {warning}", flush=True)
    for split in layout.SPLITS:
        print(f"{source.name}: {len(source.paths[split])} {split} images", flush=True)
    return source


def write_images(
    folder: Path, source: Source, reading: decode.Reading, data: Data, image_size: int
) -> tuple[dict[str, NDArray[np.int64]], list[dict[str, str]]]:
    """Write each split's images.npy, with three channels if it is not yet known whether a folder has colour.

    Returns:
        The indices of each split's images that were written, and path and reason of all others.
    """
    channels = {"grey": 1, "rgb": 3, "auto": source.channels or 3}[data.colour]
    kept = {}
    skipped = list(source.skipped)
    for split in layout.SPLITS:
        (folder / split).mkdir()
        read = partial(source.read, split, reading=reading, image_size=image_size, channels=channels)
        shape = (image_size, image_size, channels)
        target = folder / split / "images.npy"
        written, failed = arrays.write(target, read, count=len(source.paths[split]), shape=shape, what=split)
        kept[split] = np.array(written, np.int64)
        skipped += [{"path": source.paths[split][index], "reason": reason} for index, reason in failed]
    for item in skipped[:20]:
        print(f"skipped {item['path']}: {item['reason']}", flush=True)
    return kept, skipped


def check(
    source: Source, kept: dict[str, NDArray[np.int64]], skipped: list[dict[str, str]], max_skipped: float
) -> None:
    """Raise DataError if too few images could be read."""
    total = sum(len(indices) for indices in kept.values()) + len(skipped)
    if len(skipped) > max_skipped * total:
        raise DataError(
            f"expected at most {max_skipped:g} of the files to be unreadable (data.max_skipped), got {len(skipped)} of "
            f"{total} in {source.name}, first {skipped[0]['path']}: {skipped[0]['reason']}; mend or remove them, or "
            f"raise data.max_skipped"
        )
    for split, indices in kept.items():
        if not len(indices):
            raise DataError(
                f"expected {split} images in {source.name}, got none, of {total} images in all; add some to the folder"
            )


def settle_channels(folder: Path, source: Source, data: Data) -> int:
    """The number of channels; where `auto` finds no colour in a folder's images, two of three channels are removed."""
    files = [folder / split / "images.npy" for split in layout.SPLITS]
    if data.colour == "auto" and source.channels is None and not any(arrays.has_colour(path) for path in files):
        for path in files:
            arrays.keep_first_channel(path)
    channels: int = np.load(files[0], mmap_mode="r", allow_pickle=False).shape[3]
    return channels


def write_items(
    folder: Path, source: Source, split: str, indices: NDArray[np.int64], labels: NDArray[np.int64]
) -> None:
    """Write labels.npy and items.csv."""
    np.save(folder / "labels.npy", labels)
    rows = (
        {"index": row, "path": source.paths[split][index], "label": source.classes[label] if label >= 0 else ""}
        for row, (index, label) in enumerate(zip(indices.tolist(), labels.tolist(), strict=True))
    )
    stage.write_text(folder / "items.csv", stage.table(rows, ["index", "path", "label"]))


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
