"""Named data sets: where they come from, that damaged files are never taken, and that torchvision reads the same."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import scipy.io
from scipy.io import savemat
from torchvision import datasets

from deepclust.datasets import download, fashion_mnist, idx, sources
from deepclust.errors import DataError
from deepclust.images.reading import Reading

RNG = np.random.default_rng(0)
NOWHERE = "http://127.0.0.1:1"


def idx_bytes(array: np.ndarray) -> bytes:
    """The format as its author describes it: two zeros, the type, the number of dimensions, their sizes, the values."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPCLUST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    return tmp_path / "cache"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which a server on this machine gives its files."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_idx_file_is_read_as_torchvision_reads_it_and_gzipped_too_and_damage_is_one_line(tmp_path: Path) -> None:
    content = idx_bytes(RNG.integers(0, 256, (30, 4, 2), dtype=np.uint8))
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    for name in ("a", "a.gz"):
        found = idx.read(tmp_path / name, sha256=hashlib.sha256(content).hexdigest())
        assert found.dtype == np.uint8
        assert np.array_equal(found, datasets.mnist.read_image_file(str(tmp_path / "a")).numpy())
    content = gzip.compress(content)
    for damaged in (content[:-20], b"no gzip" + content, content[:40] + b"xxxx" + content[44:]):
        (tmp_path / "a.gz").write_bytes(damaged)
        with pytest.raises(DataError, match="is damaged: expected gzip"):
            idx.read(tmp_path / "a.gz")


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small Fashion-MNIST with pins of its own, no package, no download and no Debian."""
    files = {}
    for part, count in (("train", 20), ("t10k", 10)):
        files[f"{part}-images-idx3-ubyte"] = idx_bytes(RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx_bytes(np.arange(count, dtype=np.uint8) % 10)
    monkeypatch.setattr(fashion_mnist, "FILES", {name: hashlib.sha256(c).hexdigest() for name, c in files.items()})
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "installed")
    monkeypatch.setattr(fashion_mnist, "MIRROR", NOWHERE)
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: None)
    return files


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))


def same(files: dict[str, bytes], arrays: fashion_mnist.Arrays) -> bool:
    return all(idx_bytes(arrays[name]) == content for name, content in files.items())


def test_a_download_is_kept_in_the_cache_which_comes_first_but_never_a_damaged_one(
    served: tuple[Path, str], cache: Path, fashion: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "MIRROR", served[1])
    put(served[0], fashion | {"t10k-images-idx3-ubyte": b"something else"})
    with pytest.raises(DataError, match="expected SHA-256"):
        fashion_mnist.load()
    assert not cache.exists()
    put(served[0], fashion)
    assert same(fashion, fashion_mnist.load())
    monkeypatch.setattr(fashion_mnist, "MIRROR", NOWHERE)
    assert same(fashion, fashion_mnist.load())


def test_a_damaged_cache_file_is_replaced_by_the_next_source_with_a_warning(
    tmp_path: Path, cache: Path, fashion: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    put(cache / "fashion-mnist", fashion)
    put(tmp_path / "installed", fashion)
    name, wrong = "t10k-labels-idx1-ubyte", idx_bytes(np.arange(10, dtype=np.uint8)[::-1])
    (cache / "fashion-mnist" / f"{name}.gz").write_bytes(gzip.compress(wrong))
    assert same(fashion, fashion_mnist.load())
    assert f"expected SHA-256 {fashion_mnist.FILES[name]}" in capsys.readouterr().err


@pytest.mark.usefixtures("fashion")
def test_fashion_mnist_from_nowhere_is_one_line_that_names_every_source() -> None:
    sources = "the cache: not there.*Debian's package in.*not be reached.*no apt-get.*connect this machine"
    with pytest.raises(DataError, match=rf"^[^\n]*{sources}[^\n]*$"):
        fashion_mnist.load()


def test_debians_tools_are_the_last_source_after_an_update_of_the_package_lists(
    tmp_path: Path, cache: Path, fashion: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    package, tools = tmp_path / "package", tmp_path / "bin"
    put(package, fashion)
    tools.mkdir()
    fetch = "[ -e updated ] && touch dataset-fashion-mnist_1.deb"
    (tools / "apt-get").write_text(f'#!/bin/sh\ncase "$*" in *update*) touch updated;; *) {fetch};; esac\n')
    (tools / "dpkg-deb").write_text(f'#!/bin/sh\nmkdir -p "$3"{package}\ncp {package}/* "$3"{package}/\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: f"/{name}")
    # What the package holds lies under this path inside of it; it does not exist outside.
    monkeypatch.setattr(fashion_mnist, "INSTALLED", package)
    real = fashion_mnist._read
    monkeypatch.setattr(fashion_mnist, "_read", lambda folder: real(folder if folder != package else tmp_path / "none"))
    assert same(fashion, fashion_mnist.load())
    assert (cache / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").exists()


def test_a_file_is_downloaded_if_its_sum_is_wrong_and_is_right_or_nothing(
    served: tuple[Path, str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (served[0] / "a").write_bytes(b"content")
    cache.mkdir()
    (cache / "a").write_bytes(b"damaged")
    sha256 = hashlib.sha256(b"content").hexdigest()
    mirrors = [f"{NOWHERE}/a", f"{served[1]}/none", f"{served[1]}/a"]
    assert download.verified(cache / "a", mirrors, sha256=sha256).read_bytes() == b"content"
    warned = capsys.readouterr().err
    assert "is damaged" in warned
    assert f"{served[1]}/a is not encrypted" in warned
    assert download.verified(cache / "a", [f"{NOWHERE}/a"], sha256=sha256) == cache / "a"
    one_line = rf"^[^\n]*sent a file of SHA-256 {sha256} where[^\n]* \(SHA-256 {'0' * 64}\) at {cache / 'b'}$"
    with pytest.raises(DataError, match=one_line):
        download.verified(cache / "b", [f"{served[1]}/a"], sha256="0" * 64)
    assert list(cache.iterdir()) == [cache / "a"]


@pytest.mark.parametrize("name", [name for name in sources.LOADERS if name != "FashionMNIST"])
def test_every_file_is_asked_for_by_https_first_and_checked_by_sha256_before_it_is_opened(
    served: tuple[Path, str], cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = []

    def answer(url: str, timeout: float) -> object:
        asked.append(url)
        return urlopen(f"{served[1]}/forged", timeout=timeout)

    (served[0] / "forged").write_bytes(b"forged")
    monkeypatch.setattr(download.urllib.request, "urlopen", answer)
    for module, reader in ((sources.tarfile, "open"), (idx, "read"), (scipy.io, "loadmat")):
        monkeypatch.setattr(module, reader, lambda *_, **__: pytest.fail("opened"))
    forged = hashlib.sha256(b"forged").hexdigest()
    with pytest.raises(DataError, match=rf"^[^\n]*sent a file of SHA-256 {forged} where [0-9a-f]{{64}} was[^\n]*$"):
        sources.load(name)
    assert asked[0].startswith("https://")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_fashion_mnist_comes_by_https() -> None:
    assert fashion_mnist.MIRROR.startswith("https://")


def test_a_cache_in_the_home_of_nobody_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPCLUST_CACHE", "~nouser/cache")
    with pytest.raises(DataError, match=r"^expected a folder for downloads at ~nouser/cache,[^\n]*$"):
        download.cache()


@pytest.fixture
def unverified(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whatever lies in the cache is taken, by torchvision too, as if its sum were right."""
    monkeypatch.setattr(sources.download, "verified", lambda target, urls, sha256: target)
    for kind in (datasets.SVHN, datasets.STL10):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    (cache / "svhn").mkdir(parents=True)
    return cache


def archive(cache: Path, name: str, folder: str, files: dict[str, bytes]) -> None:
    (cache / folder).mkdir()
    for file, content in files.items():
        (cache / folder / file).write_bytes(content)
    shutil.make_archive(str(cache / name), "gztar", cache, folder)


def test_cifar_is_read_from_its_binary_files_with_its_fine_labels(unverified: Path) -> None:
    images = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)  # as CIFAR stores them: red, then green, then blue
    records = [bytes([number % 10]) + image.tobytes() for number, image in enumerate(images)]
    ten = {f"data_batch_{n}.bin": b"".join(records[2 * n - 2 : 2 * n]) for n in range(5, 0, -1)}
    ten |= {"test_batch.bin": b"".join(records[10:])}
    ten |= {"batches.meta.txt": ("\n".join(f"class{n}" for n in range(10)) + "\n\n").encode()}
    archive(unverified, "cifar-10-binary", "cifar-10-batches-bin", ten)
    found = sources.load("CIFAR10")
    assert np.array_equal(found.images["train"], images[:10].transpose(0, 2, 3, 1))
    assert np.array_equal(found.images["test"], images[10:].transpose(0, 2, 3, 1))
    assert (found.labels.tolist(), found.classes[3]) == ([*range(10), 0, 1], "class3")
    assert found.paths[9:] == ["train/000009", "test/000000", "test/000001"]
    assert (found.sides, found.image_size, found.channels) == (["train"] * 10 + ["test"] * 2, 32, 3)
    for index, image in enumerate(images.transpose(0, 2, 3, 1)):
        assert np.array_equal(found.read(index, Reading(), image_sizes=[32], channels=3)[0], image)
        assert found.inspect(index, Reading()).sha256 == hashlib.sha256(image.tobytes()).hexdigest()
    shapes = [image.shape for image in found.read(11, Reading(), image_sizes=[14, 32], channels=1)]
    assert shapes == [(14, 14, 1), (32, 32, 1)]
    hundred = {name: bytes([7, label]) + images[0].tobytes() for name, label in (("train.bin", 42), ("test.bin", 99))}
    hundred |= {"fine_label_names.txt": "\n".join(f"fine{n}" for n in range(100)).encode()}
    archive(unverified, "cifar-100-binary", "cifar-100-binary", hundred)
    found = sources.load("CIFAR100")
    assert (found.labels.tolist(), found.sides) == ([42, 99], ["train", "test"])


def test_svhn_is_torchvisions_and_calls_its_tenth_digit_zero(unverified: Path) -> None:
    images = RNG.integers(0, 256, (32, 32, 3, 3), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(unverified / "svhn" / f"{split}_32x32.mat", {"X": images, "y": np.array([[10], [1], [9]], np.uint8)})
    found = sources.load("SVHN")
    assert found.labels.tolist() == [0, 1, 9, 0, 1, 9]
    theirs = datasets.SVHN(unverified / "svhn", "test")
    assert np.array_equal(found.images["test"], theirs.data.transpose(0, 2, 3, 1))


def test_stl10_is_torchvisions_with_its_unlabelled_images_in_train(
    unverified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"train": 2, "unlabeled": 3, "test": 1}
    monkeypatch.setattr(sources, "STL10_IMAGES", counts)
    files = {f"{name}_X.bin": RNG.bytes(count * 3 * 96 * 96) for name, count in counts.items()}
    files |= {"train_y.bin": bytes([1, 10]), "test_y.bin": bytes([5])}
    files |= {"class_names.txt": "\n".join(f"c{n}" for n in range(10)).encode()}
    archive(unverified, "stl10_binary", "stl10_binary", files)
    found = sources.load("STL10")
    for split, name in (("train", "train+unlabeled"), ("test", "test")):
        theirs = datasets.STL10(unverified, name)
        assert np.array_equal(found.images[split], theirs.data.transpose(0, 2, 3, 1))
        assert np.array_equal(found.labels[np.array(found.sides) == split], theirs.labels)
    assert found.classes == theirs.classes
