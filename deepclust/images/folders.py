"""A folder of images as a source: what its shape says of splits and labels, in this order.

labels.csv         `path,label`; an image with an empty label, or not listed, is unlabelled
train/… test/…     (or val, valid, validation) each side is read as below; without the second, the seed draws one
<class>/…          the first folder is the class; `unlabelled/` beside them is none
anything else      unlabelled: loose images, or one folder only
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from deepclust.errors import DataError
from deepclust.images import decode, find
from deepclust.images.source import Source

LABELS = "labels.csv"
TRAIN = ("train",)
TEST = ("test", "val", "valid", "validation")
UNLABELLED = ("unlabelled", "unlabeled")

Side = dict[str, str]  # path: the same within its side, where its first folder is its class


@dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """A folder of image files.

    Attributes:
        root: The folder.
        max_pixels: See `decode.read_image`.
    """

    root: Path
    max_pixels: int

    def inspect(self, index: int, reading: decode.Reading) -> decode.Inspected:
        """What is known of a file without its pixels. Raises: DataError with the reason."""
        return decode.inspect(self.root / self.paths[index], reading, max_pixels=self.max_pixels)

    def read(self, index: int, reading: decode.Reading, *, image_size: int, channels: int) -> NDArray[np.uint8]:
        """An image as (image_size, image_size, channels) uint8. Raises: DataError with the reason."""
        path = self.root / self.paths[index]
        return decode.read_image(path, reading, image_size=image_size, channels=channels, max_pixels=self.max_pixels)


def load(path: str, *, max_pixels: int) -> Folder:
    """List a folder's images with their labels and, if it states them, their sides. No image is opened yet.

    Args:
        path: As in params.yaml.
        max_pixels: See `decode.read_image`.

    Raises:
        DataError: If there is no such folder, it holds no images, or labels.csv does not fit it.
    """
    root = Path(path).expanduser()
    files = find.images(root)
    if not files.images:
        reason = "".join("; the first left out: {path}: {reason}".format(**item) for item in files.skipped[:1])
        raise DataError(
            f"expected images ({' '.join(sorted(decode.EXTENSIONS))}) in {root}, found none among "
            f"{files.ignored + len(files.skipped)} files{reason}; check data.folder"
        )
    warnings: list[str] = []
    top = _top(root, files.images)
    sides = _sides(files.images, top, warnings)
    if (root / top / LABELS).is_file():
        listed = _read_labels(root, top, files)
        found = {split: [listed.get(image) for image in side] for split, side in sides.items()}
    else:
        found = {split: _classes(list(side.values()), warnings) for split, side in sides.items()}
    _drop_single(found, warnings)
    classes = sorted({label for labels in found.values() for label in labels if label is not None})
    numbers: dict[str | None, int] = {None: -1} | {name: number for number, name in enumerate(classes)}
    return Folder(
        root=root,
        name=root.name if root.is_absolute() else PurePosixPath(path).as_posix(),
        classes=classes,
        paths=[image for side in sides.values() for image in side],
        labels=np.array([numbers[label] for labels in found.values() for label in labels], np.int64),
        sides=[split for split, side in sides.items() for _ in side] if "test" in sides else None,
        max_pixels=max_pixels,
        warnings=warnings,
        skipped=files.skipped,
        ignored=files.ignored,
    )


def _heads(paths: Iterable[str]) -> set[str]:
    """First folders of paths that lie in one."""
    return {path.split("/", 1)[0] for path in paths if "/" in path}


def _first(heads: set[str], names: Iterable[str]) -> str | None:
    """The folder that has the first of these names, in whatever case."""
    return next((head for name in names for head in sorted(heads) if head.lower() == name), None)


def _top(root: Path, images: list[str]) -> str:
    """`name/` if that one folder wraps the whole data set, as archives do; else nothing."""
    heads = _heads(images)
    if len(heads) != 1 or not all("/" in image for image in images) or (root / LABELS).is_file():
        return ""
    top = f"{heads.pop()}/"
    inner = _heads(image.removeprefix(top) for image in images)
    return top if (root / top / LABELS).is_file() or (_first(inner, TRAIN) and _first(inner, TEST)) else ""


def _sides(images: list[str], top: str, warnings: list[str]) -> dict[str, Side]:
    """The images of `train` and, if the folder has one, `test`."""
    inner = {image: image.removeprefix(top) for image in images}
    heads = _heads(inner.values())
    unlabelled = {head for head in heads if head.lower() in UNLABELLED}
    train, test = _first(heads, TRAIN), _first(heads, TEST)
    loose = any("/" not in path for path in inner.values())
    if train is None or (test is None and (loose or heads - unlabelled != {train})):
        return {"train": inner}
    sides: dict[str, Side] = {"train": {}, "test": {}} if test else {"train": {}}
    unused: set[str] = set()
    for image, path in inner.items():
        head, _, rest = path.rpartition("/") if "/" not in path else path.partition("/")
        if head == train:
            sides["train"][image] = rest
        elif head in unlabelled:
            sides["train"][image] = path
        elif head and head == test:
            sides["test"][image] = rest
        else:
            unused.add(head or rest)
    if unused:
        names = ", ".join(sorted(unused)[:5]) + (" …" if len(unused) > 5 else "")
        warnings.append(f"not used beside {train}/ and {test}/: {names}")
    return sides


def _classes(paths: list[str], warnings: list[str]) -> list[str | None]:
    """The class of each path, which is its first folder."""
    heads = {head for head in _heads(paths) if head.lower() not in UNLABELLED}
    loose = sum("/" not in path for path in paths)
    if heads and loose:
        warnings.append(
            f"taken as unlabelled: {loose} images lie beside {len(heads)} folders; "
            f"move them into {UNLABELLED[0]}/ if the folders are classes"
        )
        heads = set()
    return [head if (head := path.split("/", 1)[0]) in heads else None for path in paths]


def _drop_single(found: dict[str, list[str | None]], warnings: list[str]) -> None:
    """One class folder alone is a wrapping (`folder/images/…`), so no label."""
    known = {split: {label for label in labels if label is not None} for split, labels in found.items()}
    for split, labels in found.items():
        others = set().union(*(names for other, names in known.items() if other != split))
        if len(known[split]) == 1 and not (known[split] < others):
            warnings.append(f"taken as unlabelled: all labelled {split} images are of one class, {known[split].pop()}")
            found[split] = [None] * len(labels)


def _read_labels(root: Path, top: str, files: find.Files) -> dict[str, str | None]:
    """labels.csv as path: class, paths relative to the root.

    Raises:
        DataError: If a column is missing, or a path leaves the folder, is listed twice or is no image there.
    """
    known = set(files.images) | {item["path"] for item in files.skipped}
    labels: dict[str, str | None] = {}
    try:
        with (root / top / LABELS).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            if missing := {"path", "label"} - set(rows.fieldnames or ()):
                raise DataError(
                    f"{LABELS}: expected the columns path and label in its first line, found no "
                    f"{' and no '.join(sorted(missing))}; add it"
                )
            for row in rows:
                path = PurePosixPath(row["path"] or "")
                name, problem = f"{top}{path}", None
                if not row["path"] or row["label"] is None:
                    problem = "expected a path and a label (or nothing after the comma); complete the line"
                elif path.is_absolute() or ".." in path.parts:
                    problem = f"expected a path inside the folder, got {row['path']!r}; mend or remove it"
                elif name not in known:
                    problem = f"expected an image of the folder, found no {row['path']!r}; mend or remove it"
                elif name in labels:
                    problem = f"expected each image once, got {row['path']!r} again; remove one of the lines"
                if problem:
                    raise DataError(f"{LABELS} line {rows.line_num}: {problem}")
                labels[name] = row["label"].strip() or None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{LABELS}: expected a CSV file in UTF-8, got: {error}; save it as such") from error
    return labels
