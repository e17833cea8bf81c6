"""Which images lie below a folder. Names are not trusted: nothing outside of it is listed unless asked for."""

from __future__ import annotations

import heapq
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from deepclust.errors import DataError
from deepclust.images import formats

# What NAS, desktops and editors make, with thumbnails and deleted files, in lower case. Hidden folders need no name.
SYSTEM = frozenset(
    [
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharebin", "#recycle", "#snapshot", "$recycle.bin"),
        *("recycler", "system volume information", "lost+found", "network trash folder", "temporary items"),
        *("__macosx", "__pycache__"),
    ]
)


@dataclass
class Files:
    """What lies in a folder.

    Attributes:
        images: Sorted paths relative to the folder, with forward slashes.
        stacks: Likewise, NumPy files that may hold many images. Beside image files they are skipped.
        skipped: `path` and `reason` of what should have been an image and is left out.
        ignored: Number of other files. Hidden ones are not counted.
        linked: Links to folders that were followed.
        warnings: What the user should know besides.
    """

    images: list[str] = field(default_factory=list)
    stacks: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    ignored: int = 0
    linked: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def warnings_of_stage(self) -> list[str]:
        """The warnings, and that DVC knows a folder by the files in it and those that they link to, but no others."""
        if not self.linked:
            return list(self.warnings)
        names = ", ".join(self.linked[:5]) + (" …" if len(self.linked) > 5 else "")
        unseen = f"DVC does not notice what changes behind links to folders ({names}); after a change, run dvc repro -f"
        return [*self.warnings, unseen]

    def skip(self, path: str, reason: str) -> None:
        """Leave a path out; what is not UTF-8 in it is written as an escape."""
        self.skipped.append({"path": path.encode("utf-8", "backslashreplace").decode(), "reason": reason})

    def skip_stacks(self, reason: str) -> None:
        """Leave all stacks out, where they are not read."""
        for path in self.stacks:
            self.skip(path, reason)
        self.stacks.clear()

    def add(self, path: str, format_: formats.Format | None) -> None:
        """Put a file where its format belongs."""
        if format_ is None:
            self.ignored += 1
        elif format_ is formats.STACK:
            self.stacks.append(path)
        elif format_.problem:
            self.skip(path, format_.problem)
        else:
            self.images.append(path)


def images(root: Path, follow_links: bool = False) -> Files:
    """List the images below a folder, in an order that depends on their names alone.

    Args:
        root: The folder.
        follow_links: Whether to take files and folders that symbolic links point to outside of it. A real folder is
            taken once: under its own path if it has one below the root, else under the first link to it.

    Raises:
        DataError: If there is no such folder.
    """
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(f"expected a folder of images at {root}, found {found}; check the path")
    files = Files()
    real = root.resolve()
    system: Counter[str] = Counter()
    entered: set[Path] = set()
    folders = [""]
    links: list[str] = []  # wait until no real folder is left, since those are taken under their own paths
    while folders or links:
        is_link = not folders
        prefix = heapq.heappop(links) if is_link else folders.pop()
        if follow_links:
            where = (root / prefix).resolve()
            if where in entered:
                files.skip(prefix.rstrip("/"), "the same folder as another one")
                continue
            entered.add(where)
            files.linked += [prefix.rstrip("/")] if is_link else []
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
            if reason := _refused(entry, real, follow_links):
                if formats.by_name(entry.name) or Path(entry.path).is_dir():  # which does not raise on a circle
                    files.skip(path, reason)
                else:
                    files.ignored += 1
            elif not entry.is_dir():
                files.add(path, formats.of(entry.path) if entry.is_file() else None)
            elif entry.name.lower() in SYSTEM:
                system[entry.name] += _count(Path(entry.path))
            elif entry.is_symlink():
                heapq.heappush(links, f"{path}/")
            else:
                folders.append(f"{path}/")
    if files.images:
        files.skip_stacks("NumPy stack beside image files: move it into a folder of its own")
    files.images.sort()
    files.stacks.sort()
    files.skipped.sort(key=lambda item: item["path"])
    files.ignored += system.total()
    if system.total():
        where_from = ", ".join(f"{count} in {name}" for name, count in sorted(system.items()) if count)
        files.warnings.append(f"ignored images in folders of a NAS or desktop: {where_from}")
    return files


def _count(folder: Path) -> int:
    """Number of images below a folder, as their names state; hidden ones do not count."""
    found = (name for _, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return sum(formats.by_name(name) is not None for name in found)


def _refused(entry: os.DirEntry[str], real: Path, follow_links: bool) -> str | None:
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
    if follow_links:
        return None
    if not target.is_relative_to(real):
        return "a link that leaves the folder; data.follow_links: true would take it"
    return "a link to a folder" if target.is_dir() else None
