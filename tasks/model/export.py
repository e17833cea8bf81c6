"""Files and folders for the user that appear only when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deepclust.errors import DataError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path, which is renamed to `path` when the body succeeds and removed when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def sorted_folder(folder: Path, *, link: bool) -> Iterator[Callable[[Path, str, str], None]]:
    """A function that puts an image (file, folder, path in that folder) into a new folder of folders.

    The new folder appears when the body succeeds. It may exist if it is empty.

    Args:
        folder: The folder to make.
        link: Make symbolic links instead of copies.

    Raises:
        DataError: If there is a file, or a folder with something in it.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"expected a new or empty folder for the export, got {folder}; name another or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()  # with the usual permissions, where the temporary one is private

        def add(image: Path, inside: str, name: str) -> None:
            target = partial / inside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if link:
                target.symlink_to(image.resolve())
            else:
                shutil.copyfile(image, target)

        yield add
        partial.replace(folder)
