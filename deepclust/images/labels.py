"""A table of labels beside the images, as people and spreadsheets write it, and spellings that mean one class."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal
from pathlib import Path, PurePosixPath

from deepclust.errors import DataError

UNLABELLED = ("unlabelled", "unlabeled")
_FILES = ("labels.csv", "labels.tsv")
_ALMOST = re.compile(r"labels?\.(csv|tsv|xlsx?|ods)(\.txt)?", re.IGNORECASE)  # a table, but not one that is read
_PATHS = ("file", "files", "filename", "filepath", "image", "imagename", "imagepath", "img", "imgpath", "imagefile")
_LABELS = ("labels", "class", "classname", "classlabel", "category", "target")
_NONE = (*UNLABELLED, "unknown", "-1", "-1.0", "nan", "none", "null", "na", "n/a", "#n/a", "?", "")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)  # neither 1e3 nor 1_0, which are rather names
_SHOWN = 5  # as many as a message names

Row = tuple[int, list[str]]  # number of the line, and its cells


def find(root: Path, places: Sequence[str], folders: Iterable[str], warnings: list[str]) -> str | None:
    """The table of labels that counts, as a path relative to the root.

    Args:
        root: The folder of images.
        places: Folders in which it may be, the first one with a table counts; "" is the root itself, others end in "/".
        folders: All folders, to warn of tables that are not used.
        warnings: Where this is said.
    """
    found = {}
    almost = []
    for folder in {*places, *folders}:
        with os.scandir(root / folder) as entries:
            names = [entry.name for entry in entries if _ALMOST.fullmatch(entry.name)]
        almost += [folder + name for name in names if name.lower() not in _FILES]
        names = [name for name in names if name.lower() in _FILES]
        found[folder] = [folder + name for name in sorted(names, key=lambda name: (name.lower(), name))]
    used = next((table for place in places for table in found[place]), None)
    if others := sorted(table for tables in found.values() for table in tables if table != used):
        where = f"beside {used}" if used else "in a sub-folder"
        warnings.append(
            f"not used {where}: {_some(others)}; put all labels into one table, {_FILES[0]}, in the folder itself"
        )
    if almost and not used:
        warnings.append(f"not read as a table of labels: {_some(sorted(almost))}; save it as {_FILES[0]}")
    return used


def read(
    root: Path, table: str, images: Sequence[str], skipped: Collection[str], warnings: list[str]
) -> dict[str, str | None]:
    """The label of each image that a table lists, None where it has none.

    Args:
        root: The folder of images.
        table: See `find`.
        images: Paths of its images.
        skipped: Paths of images that were left out; they may be listed too.
        warnings: Where it is said what is not labelled, and which spellings are one class.

    Raises:
        DataError: If the table can not be read, a column is missing, or a path leaves the folder, is listed twice or is
            no image there.
    """
    name = PurePosixPath(table).name
    rows = _rows(root / table, name)
    path_column, label_column, width = _columns(rows[:1], name)
    places = _Places(root, table, [*images, *skipped])
    labels: dict[str, str | None] = {}
    missing: list[Row] = []
    for line, cells in rows[1:]:
        path, label = (
            (*cells, "", "")[path_column].strip(),
            cells[label_column].strip() if label_column < len(cells) else None,
        )
        problem = None
        if not path or label is None:
            problem = "expected a path and a label (or nothing after the separator); complete the line"
        elif any(cell.strip() for cell in cells[width:]):
            problem = (
                f"expected {width} columns, got {len(cells)}; put quotation marks around what has a separator in it"
            )
        else:
            fitting = places.of(path)
            if fitting is None:
                problem = f"expected a path inside the folder, got {path!r}; mend or remove it"
            elif len(fitting) > 1:
                problem = f"expected one image, {path!r} may be {_some(fitting)}; complete it"
            elif fitting and fitting[0] in labels:
                problem = f"expected each image once, got {path!r} again; remove one of the lines"
            elif fitting:
                labels[fitting[0]] = label
            else:
                missing.append((line, [path]))
        if problem:
            raise DataError(f"{name} line {line}: {problem}")
    if missing:
        more = f", and of {len(missing) - 1} more lines ({_some([cells[0] for _, cells in missing[1:]])})"
        raise DataError(
            f"{name} line {missing[0][0]}: expected an image of the folder, found no {missing[0][1][0]!r}"
            f"{more if len(missing) > 1 else ''}; mend or remove it"
        )
    return _without_none(labels, images, name, warnings)


def united(labels: Sequence[str | None], what: str, warnings: list[str], *, numbers: bool = False) -> list[str | None]:
    """Labels that differ in case or blanks alone become one, in its most frequent spelling.

    Args:
        labels: None is no label.
        what: They are called so in a warning.
        warnings: Where it is said.
        numbers: Whether equal numbers, such as 1 and 1.0, are one label too.
    """
    counts = Counter(label for label in labels if label is not None)

    def key(label: str) -> str | Decimal:
        return Decimal(label) if numbers and _NUMBER.fullmatch(label) else same(label)

    spellings: dict[str | Decimal, list[str]] = {}
    for label, _ in sorted(counts.items(), key=lambda item: (-item[1], len(item[0]), item[0])):
        spellings.setdefault(key(label), []).append(label)
    if several := [" = ".join(map(repr, names)) for names in spellings.values() if len(names) > 1]:
        warnings.append(f"{what} that are taken as one class: {_some(several)}; spell them alike")
    one = {label: names[0] for names in spellings.values() for label in names}
    return [None if label is None else one[label] for label in labels]


def same(label: str) -> str:
    """What a label is apart from case, blanks and the way in which accents are stored."""
    return " ".join(unicodedata.normalize("NFC", label).casefold().split())


def means_none(label: str) -> bool:
    """Whether a label says that there is none, as `nan` and `unlabelled` do."""
    return label.strip().casefold() in _NONE


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")


def _rows(file: Path, name: str) -> list[Row]:
    """The lines that are not empty, the first of which names the columns."""
    if not file.is_file():
        found = "a folder" if file.is_dir() else "a broken link" if not file.exists() else "no file"
        raise DataError(f"{name}: expected a table, got {found}; replace or remove {file}")
    content = file.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        if "\0" in text:
            raise DataError(f"{name}: expected a CSV file in UTF-8, got bytes that are no text; save it as such")
        first = next((line for line in text.splitlines() if line.strip()), "")
        stated = re.fullmatch(r"sep=(.)", first.strip(), re.IGNORECASE)  # a spreadsheet's first line
        separator = stated[1] if stated else max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{name}: expected a CSV file in UTF-8, got: {error}; save it as CSV UTF-8") from error
    return rows[1:] if stated else rows


def _columns(header: list[Row], name: str) -> tuple[int, int, int]:
    """Numbers of the columns path and label, and how many columns there are."""
    cells = header[0][1] if header else []
    names = [re.sub(r"[\W_]+", "", cell).casefold() for cell in cells]
    found: dict[str, list[int]] = {}
    for wanted, others in (("path", _PATHS), ("label", _LABELS)):
        exact = [column for column, each in enumerate(names) if each == wanted]
        found[wanted] = exact or [column for column, each in enumerate(names) if each in others]
        if len(found[wanted]) > 1:
            several = " and ".join(cells[column].strip() for column in found[wanted])
            raise DataError(f"{name}: expected one column {wanted}, found {several}; call one of them {wanted}")
    if missing := [wanted for wanted, columns in found.items() if not columns]:
        raise DataError(
            f"{name}: expected the columns path and label in its first line, found {_some(cells) or 'nothing'}; "
            f"rename or add {' and '.join(missing)}"
        )
    return found["path"][0], found["label"][0], len(cells)


class _Places:
    """Which images a path in a table may mean."""

    def __init__(self, root: Path, table: str, images: Sequence[str]) -> None:
        self._by_path: dict[str, str] = {}
        self._by_stem: dict[str, list[str]] = {}
        for image in images:
            path = unicodedata.normalize("NFC", image)
            self._by_path[path] = image
            self._by_stem.setdefault(path.rpartition(".")[0], []).append(image)
        top = table.rpartition("/")[0]
        common = os.path.commonpath([PurePosixPath(image).parent for image in images])
        # Relative to the table, to the root, to the root's own parent, or to the one folder with all images.
        self._starts = list(dict.fromkeys([top, "", common]))
        self._name = unicodedata.normalize("NFC", root.resolve().name)

    def of(self, text: str) -> list[str] | None:
        """No image, one, or several that differ in their suffix; None if the path leaves the folder."""
        path = PurePosixPath(unicodedata.normalize("NFC", text).replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:[\\/]", text):
            return None
        paths = [str(PurePosixPath(start) / path) for start in self._starts]
        if path.parts[:1] == (self._name,):
            paths.append("/".join(path.parts[1:]))
        exact = [self._by_path[each] for each in paths if each in self._by_path]
        return exact[:1] or next((self._by_stem[each] for each in paths if each in self._by_stem), [])


def _without_none(
    labels: dict[str, str | None], images: Sequence[str], name: str, warnings: list[str]
) -> dict[str, str | None]:
    """The same without labels that mean none, of which the spellings are told, and with one spelling a class."""
    known = {label for label in labels.values() if label and label.casefold() not in _NONE}
    none = set(_NONE)
    if known and all(_NUMBER.fullmatch(label) and Decimal(label) == 1 for label in known):
        none -= {"-1", "-1.0"}  # the two classes -1 and 1
    cleaned = {image: None if (label or "").casefold() in none else label for image, label in labels.items()}
    counts = Counter(labels.get(image) for image in images if cleaned.get(image) is None)
    if counts:
        told = {None: "not listed", "": "empty"} | {label: repr(label) for label in counts if label}
        spellings = _some([f"{told[label]} ({count})" for label, count in counts.most_common()])
        warnings.append(f"{name}: {counts.total()} of {len(images)} images have no label: {spellings}")
    united_labels = united(list(cleaned.values()), f"{name}: labels", warnings, numbers=True)
    return dict(zip(cleaned, united_labels, strict=True))
