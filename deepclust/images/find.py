"""Which images lie below a folder. Names from data are not trusted: nothing outside of the folder is ever listed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from deepclust.errors import DataError
from deepclust.images import decode


@dataclass
class Files:
    """What lies in a folder.

    Attributes:
        images: Sorted paths relative to the folder, with forward slashes.
        skipped: `path` and `reason` of what should have been an image and is left out.
        ignored: Number of other files. Hidden ones are not counted.
    """

    images: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    ignored: int = 0

    def skip(self, path: str, reason: str) -> None:
        """Leave a path out; what is not UTF-8 in it is written as an escape."""
        self.skipped.append({"path": path.encode("utf-8", "backslashreplace").decode(), "reason": reason})


def images(root: Path) -> Files:
    """List the images below a folder, in an order that depends on their names alone.

    Raises:
        DataError: If there is no such folder.
    """
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(f"expected a folder of images at {root}, found {found}; check the path")
    files = Files()
    real = root.resolve()
    folders = [""]
    while folders:
        prefix = folders.pop()
        try:
            entries = list(os.scandir(root / prefix))
        except OSError as error:
            if not prefix:
                raise
            files.skip(prefix.rstrip("/"), (error.strerror or "can not be listed").lower())
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = prefix + entry.name
            if reason := _refused(entry, real):
                if decode.is_image(entry.name) or Path(entry.path).is_dir():  # which does not raise on a circle
                    files.skip(path, reason)
                else:
                    files.ignored += 1
            elif entry.is_dir():
                folders.append(f"{path}/")
            elif entry.is_file() and decode.is_image(entry.name):
                files.images.append(path)
            else:
                files.ignored += 1
    files.images.sort()
    files.skipped.sort(key=lambda item: item["path"])
    return files


def _refused(entry: os.DirEntry[str], real: Path) -> str | None:
    """Why a file or folder is not taken, if so."""
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    if not entry.is_symlink():
        return None
    try:
        target = Path(entry.path).resolve(strict=True)
    except (OSError, RuntimeError):
        return "a broken link"
    if not target.is_relative_to(real):
        return "a link that leaves the folder"
    return "a link to a folder" if target.is_dir() else None
