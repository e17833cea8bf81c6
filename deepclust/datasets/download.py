"""Downloads into a cache outside the repository, each checked against its published sum."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deepclust import temporary
from deepclust.errors import DataError

TIMEOUT = 10  # seconds without an answer: a machine that is offline should say so soon


def cache() -> Path:
    """`$DEEPCLUST_CACHE`, else `$XDG_CACHE_HOME/deepclust`, else ~/.cache/deepclust.

    Raises:
        DataError: If it lies in the home of a user who has none.
    """
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.environ.get("DEEPCLUST_CACHE") or Path(shared) / "deepclust")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise DataError(
            f"expected a folder for downloads at {path}, there is no such home; set DEEPCLUST_CACHE"
        ) from error


def warn(message: str) -> None:
    """One line on stderr. What the cache held differs between machines, so it is never written into an output."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def verified(target: Path, urls: Iterable[str], *, sha256: str) -> Path:
    """A file of the cache, downloaded if it is missing or damaged.

    Args:
        target: Where it lies, or is to lie.
        urls: Mirrors, tried in order.
        sha256: The published SHA-256 of the file.

    Raises:
        DataError: If no mirror gives the file.
    """
    if target.exists():
        got = _sha256(target)
        if got == sha256:
            return target
        warn(f"{target} is damaged (expected SHA-256 {sha256}, got {got}); downloading it again")
    problems = []
    for url in urls:
        try:
            download(url, target, sha256=sha256)
        except DataError as error:
            problems.append(str(error))
        else:
            return target
    raise DataError(
        f"expected {target.name} from its mirrors, got: {'; '.join(problems)}; connect this machine and run again, "
        f"or put the file (SHA-256 {sha256}) at {target}"
    )


def download(url: str, target: Path, *, sha256: str | None = None) -> None:
    """Download one file, whole or not at all.

    Raises:
        DataError: If the server can not be reached, or sends something whose SHA-256 differs.
    """
    assert url.startswith(("http://", "https://")), url
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url}", flush=True)
    if url.startswith("http://"):
        warn(f"{url} is not encrypted: others can see what is fetched, and only its SHA-256 tells whether it is right")
    with temporary.folder(target.parent, prefix=f".{target.name}.deepclust-") as scratch:
        partial = scratch / target.name
        sum_ = hashlib.sha256()
        with _network(url, "can not be reached"):
            answer = urllib.request.urlopen(url, timeout=TIMEOUT)
        with answer, partial.open("wb") as file:
            while True:
                with _network(url, "broke off"):
                    chunk = answer.read(1 << 20)
                if not chunk:
                    break
                sum_.update(chunk)
                file.write(chunk)
        if sha256 and sum_.hexdigest() != sha256:
            raise DataError(f"{url} sent a file of SHA-256 {sum_.hexdigest()} where {sha256} was expected")
        partial.replace(target)


@contextmanager
def _network(url: str, failed: str) -> Iterator[None]:
    """Only around what the server does, so that a full disk is not taken for a broken connection."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise DataError(f"{url} {failed} ({reason})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
