"""A folder of images as a source: what its shape says of splits and labels, in this order.

labels.csv         a table of paths and labels (`labels`); an image with an empty label, or not listed, is unlabelled
train/… test/…     (or training_set, seg_train, val2017 and so on) each side is read as below; else the seed draws them
<class>/…          the first folder is the class; `unlabelled/` beside them is none
anything else      unlabelled: loose images, or one folder only

Folders that merely wrap all of this do not count, as in `flowers/<class>/…`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from deepclust.errors import DataError
from deepclust.images import decode, find, formats, labels, layouts
from deepclust.images.reading import Reading
from deepclust.images.source import Source


@dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """A folder of image files.

    Attributes:
        root: The folder.
        max_pixels: See `decode.read_images`.
    """

    root: Path
    max_pixels: int

    def inspect(self, index: int, reading: Reading) -> decode.Inspected:
        """What is known of a file without its pixels. Raises: DataError with the reason."""
        return decode.inspect(self.root / self.paths[index], reading, max_pixels=self.max_pixels)

    def read(
        self, index: int, reading: Reading, *, image_sizes: Sequence[int], channels: int
    ) -> list[NDArray[np.uint8]]:
        """An image at each size; see `Source`. Raises: DataError with the reason."""
        path = self.root / self.paths[index]
        return decode.read_images(path, reading, image_sizes=image_sizes, channels=channels, max_pixels=self.max_pixels)


def load(path: str, files: find.Files, *, max_pixels: int) -> Folder:
    """The images of a folder with their labels and, if it states them, their sides. No image is opened yet.

    Args:
        path: The folder, as in params.yaml.
        files: What lies in it.
        max_pixels: See `decode.read_images`.

    Raises:
        DataError: If it holds no images, or labels.csv does not fit it.
    """
    root = Path(path)
    if not files.images:
        reason = "".join("; the first left out: {path}: {reason}".format(**item) for item in files.skipped[:1])
        raise DataError(
            f"expected images ({formats.readable()}) in {root}, found none among "
            f"{files.ignored + len(files.skipped)} files{reason}; check data.folder"
        )
    warnings = files.warnings_of_stage()
    sides = layouts.sides(files.images, warnings)
    table = labels.find(root, layouts.wrappings(files.images), _folders(files.images), warnings)
    if table:
        skipped = [item["path"] for item in files.skipped]
        listed = labels.read(root, table, files.images, skipped, warnings)
        named = [listed.get(image) for side in sides.values() for image in side]
    else:
        named = [name for side in sides.values() for name in layouts.classes(side.values(), warnings)]
        warnings += layouts.doubts([path for side in sides.values() for path in side.values()])
    united = iter(labels.united(named, "class folders", warnings))
    found = {split: [next(united) for _ in side] for split, side in sides.items()}
    _drop_single(found, warnings)
    classes = sorted({label for names in found.values() for label in names if label is not None})
    numbers: dict[str | None, int] = {None: -1} | {name: number for number, name in enumerate(classes)}
    return Folder(
        root=root,
        name=root.name if root.is_absolute() else PurePosixPath(path).as_posix(),
        classes=classes,
        paths=[image for side in sides.values() for image in side],
        labels=np.array([numbers[label] for names in found.values() for label in names], np.int64),
        sides=[split for split, side in sides.items() for _ in side] if "test" in sides else None,
        max_pixels=max_pixels,
        warnings=warnings,
        skipped=files.skipped,
        ignored=files.ignored - (table is not None),
    )


def _folders(images: list[str]) -> set[str]:
    """All folders that images lie in, at any depth: `a/`, `a/b/`."""
    folders = {image[: image.rfind("/") + 1] for image in images} - {""}
    for folder in list(folders):
        while (folder := folder[: folder.rfind("/", 0, -1) + 1]) and folder not in folders:
            folders.add(folder)
    return folders


def _drop_single(found: dict[str, list[str | None]], warnings: list[str]) -> None:
    """One class folder alone is a wrapping (`folder/images/…`), so no label."""
    known = {split: {label for label in own if label is not None} for split, own in found.items()}
    for split, own in found.items():
        others = set().union(*(names for other, names in known.items() if other != split))
        if len(known[split]) == 1 and not (known[split] < others):
            warnings.append(f"taken as unlabelled: all labelled {split} images are of one class, {known[split].pop()}")
            found[split] = [None] * len(own)
