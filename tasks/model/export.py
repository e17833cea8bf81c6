"""Files and folders for the user that appear only when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

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


class SortedFolder:
    """A new folder with a folder for each cluster, `cluster-07/` and so on, which appears when the body succeeds.

    An image keeps its path below its cluster's folder, so images of one name do not replace each other.

    Args:
        folder: The folder to make. It may exist if it is empty.
        link: Make symbolic links instead of copies.

    Raises:
        DataError: If there is a file, or a folder with something in it.
    """

    def __init__(self, folder: Path, *, link: bool = False) -> None:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise DataError(f"expected a new or empty folder for the export, got {folder}; name another or remove it")
        self._folder = folder
        self._link = link

    def __enter__(self) -> SortedFolder:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}.", dir=self._folder.parent))
        return self

    def add(self, image: Path, cluster: int, name: str, *, clusters: int) -> None:
        """Add one image.

        Args:
            image: The file.
            cluster: Its cluster.
            name: Its path relative to the folder it was found in.
            clusters: Number of all clusters, for the width of their numbers.
        """
        width = max(2, len(str(clusters - 1)))
        target = self._partial / f"cluster-{cluster:0{width}}" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._link:
            target.symlink_to(image.resolve())
        else:
            shutil.copyfile(image, target)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                umask = os.umask(0)
                os.umask(umask)
                self._partial.chmod(0o777 & ~umask)  # mkdtemp makes it private
                self._partial.replace(self._folder)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
