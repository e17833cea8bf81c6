"""Files and folders for the user that appear only when they are complete, and replace nothing unasked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from deepclust import temporary
from deepclust.errors import DataError


def check(files: Mapping[str, Path | None], folders: Mapping[str, Path | None], *, overwrite: bool) -> None:
    """Refuse places where nothing can or should be written, before any work.

    Args:
        files: The files to write by the options that name them; None where there is none.
        folders: Likewise the folders to make.
        overwrite: Whether files that are there may be replaced.

    Raises:
        DataError: If a file is there, or is a folder, or two of all are one place or one inside of the other.
    """
    places = {option: _real(path) for option, path in {**files, **folders}.items() if path}
    for option, path in files.items():
        if path and path.is_dir():
            raise DataError(f"expected a file for {option}, got the folder {path}; name a file in it")
        if path and path.is_file() and not _is_open(path) and not overwrite:
            raise DataError(f"expected a new file for {option}, {path} is there; name another or give --overwrite")
    for option, place in places.items():
        for other, outer in places.items():
            if option != other and outer in (place, *place.parents):
                raise DataError(f"expected {other} and {option} in two places, got {outer} and {place}; name others")


def _real(path: Path) -> Path:
    """Where links lead. Raises: DataError if nothing can be there, as where a link leads to itself."""
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(f"expected a place to write to, got {path} ({error.strerror}); name another") from error
    return path.resolve()


def _is_open(path: Path) -> bool:
    """Whether a path means what this process has open already, such as /dev/stdout, even where that is a file."""
    path = path.absolute()
    return str(path) in ("/dev/stdout", "/dev/stderr") or str(path.parent) in ("/dev/fd", "/proc/self/fd")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path, whose content becomes that of `path` when the body succeeds, and is removed when it fails.

    A file is replaced in one step, behind a symbolic link its target; a pipe, a device or stdout is written to.
    """
    if _is_open(path) or (path.exists() and not path.is_file()):
        with temporary.folder() as scratch:
            partial = scratch / "whole"
            yield partial
            with partial.open("rb") as source, path.open("ab") as target:  # what stdout holds already stays
                shutil.copyfileobj(source, target)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.folder(path.parent, prefix=_prefix(path)) as scratch:
        partial = scratch / path.name
        yield partial
        partial.replace(path)


def _prefix(path: Path) -> str:
    return f".{path.name[:40]}.deepclust-"


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
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary.folder(folder.parent, prefix=_prefix(folder)) as scratch:
        partial = scratch / folder.name
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
