"""Fashion-MNIST from whichever source has it; the same bytes from each, checked by their SHA-256.

In this order: the cache; Debian's package dataset-fashion-mnist, installed; the download; the package fetched with
Debian's tools and unpacked without installing it, for machines that reach a package mirror but not the internet.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepclust import temporary
from deepclust.datasets import download, idx
from deepclust.errors import DataError

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
# SHA-256 of the decompressed bytes: the compressed files differ between Debian and the mirror.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MIRROR = "https://fashion-mnist.s3.eu-central-1.amazonaws.com"
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
APT_LIMIT = 300  # seconds for each of apt's commands

Arrays = dict[str, NDArray[np.uint8]]


def load() -> Arrays:
    """The four arrays, by file name: images (N, 28, 28) and labels (N,).

    Raises:
        DataError: If no source has the whole data set.
    """
    cached = download.cache() / "fashion-mnist"
    sources: dict[str, Callable[[Path], Path]] = {
        "the cache": lambda _: cached,
        f"Debian's package in {INSTALLED}": lambda _: INSTALLED,
        "the download": _download,
        "Debian's package tools": _debian,
    }
    problems: list[str] = []
    for name, found_in in sources.items():
        with tempfile.TemporaryDirectory(prefix="deepclust-") as temporary:
            try:
                folder = found_in(Path(temporary))
                arrays = _read(folder)
            except FileNotFoundError:
                problems.append(f"{name}: not there")
            except DataError as error:
                problems.append(f"{name}: {error}")
                download.warn(f"Fashion-MNIST, {name}: {error}; trying the next source")
            else:
                if folder != cached and (folder != INSTALLED or cached.exists()):
                    _keep(folder, cached)
                return arrays
    raise DataError(
        f"expected Fashion-MNIST, got it from no source ({'; '.join(problems)}); connect this machine, install "
        f"{PACKAGE}, or put {', '.join(f'{name}.gz' for name in FILES)} into {cached}"
    )


def _read(folder: Path) -> Arrays:
    """All four files, gzipped or not. Raises: FileNotFoundError, DataError."""
    arrays = {}
    for name, sha256 in FILES.items():
        plain = folder / name
        arrays[name] = idx.read(plain if plain.exists() else folder / f"{name}.gz", sha256=sha256)
    return arrays


def _keep(folder: Path, cached: Path) -> None:
    """Copy files that were checked into the cache. A cache that can not be written costs time, not the run."""
    try:
        cached.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (cached / name).unlink(missing_ok=True)  # a damaged one would be read before the gzipped one
            source = folder / name if (folder / name).exists() else folder / f"{name}.gz"
            with temporary.folder(cached, prefix=f".{source.name}.deepclust-") as scratch:
                shutil.copyfile(source, scratch / source.name)
                (scratch / source.name).replace(cached / source.name)
    except OSError as error:
        download.warn(f"Fashion-MNIST is not kept in {cached} ({error.strerror}); the next run gets it again")


def _download(folder: Path) -> Path:
    for name in FILES:
        download.download(f"{MIRROR}/{name}.gz", folder / f"{name}.gz")
    return folder


def _debian(folder: Path) -> Path:
    """Fetch the package and unpack it, without installing anything or touching the system's package lists."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise DataError("this machine has no apt-get and dpkg-deb")
    print(f"fetching Debian's package {PACKAGE}", flush=True)
    options = ["-o", "Acquire::Retries=1"]
    for scheme in ("http", "https"):
        options += ["-o", f"Acquire::{scheme}::Timeout={download.TIMEOUT}"]
    if os.geteuid() == 0:
        options += ["-o", "APT::Sandbox::User=root"]  # else apt hands over to a user who can not enter our folder
    try:
        _run(["apt-get", *options, "download", PACKAGE], folder)
    except DataError:  # the machine's lists are empty or old: take fresh ones in a place of our own
        for part in ("lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        options += ["-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
        _run(["apt-get", *options, "update"], folder)
        _run(["apt-get", *options, "download", PACKAGE], folder)
    packages = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if not packages:
        raise DataError(f"apt-get downloaded no {PACKAGE}")
    _run(["dpkg-deb", "-x", str(packages[0]), str(folder / "unpacked")], folder)
    return folder / "unpacked" / INSTALLED.relative_to("/")


def _run(command: list[str], folder: Path) -> None:
    words = " ".join(word for word in command if word.isalpha() or word in (PACKAGE, "apt-get", "dpkg-deb"))
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=APT_LIMIT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{words} took longer than {APT_LIMIT} s") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise DataError(f"{words} failed: {last}")
