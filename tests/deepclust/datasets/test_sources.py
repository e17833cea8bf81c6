"""Named data sets: where they come from, that damaged files are never taken, and that torchvision reads the same."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision import datasets

from deepclust.datasets import download, fashion_mnist, idx, sources
from deepclust.errors import DataError
from deepclust.images import sampling

RNG = np.random.default_rng(0)
NOWHERE = "http://127.0.0.1:1"


def idx_bytes(array: np.ndarray) -> bytes:
    """The format as its author describes it: two zeros, the type, the number of dimensions, their sizes, the values."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPCLUST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which a server on this machine gives its files."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)])
def test_an_idx_file_is_read_as_torchvision_reads_it_and_gzipped_too(tmp_path: Path, shape: tuple[int, ...]) -> None:
    content = idx_bytes(RNG.integers(0, 256, shape, dtype=np.uint8))
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    read = datasets.mnist.read_label_file if len(shape) == 1 else datasets.mnist.read_image_file
    for name in ("a", "a.gz"):
        found = idx.read(tmp_path / name, sha256=hashlib.sha256(content).hexdigest())
        assert found.dtype == np.uint8
        assert np.array_equal(found, read(str(tmp_path / "a")).numpy())


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"no gzip" + b, lambda b: b[:40] + b"xxxx" + b[44:]])
def test_a_damaged_gzip_file_is_one_line_of_error(tmp_path: Path, damage: object) -> None:
    content = gzip.compress(idx_bytes(RNG.integers(0, 256, 500, dtype=np.uint8)))
    (tmp_path / "a.gz").write_bytes(damage(content))  # type: ignore[operator]
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


def test_fashion_mnist_comes_from_the_installed_package_and_is_not_kept_then(
    tmp_path: Path, cache: Path, fashion: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "installed", fashion)
    assert same(fashion, fashion_mnist.load())
    assert not cache.exists()
    assert capsys.readouterr().err == ""


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
    assert sorted(path.name for path in (cache / "fashion-mnist").iterdir()) == sorted(f"{name}.gz" for name in fashion)


@pytest.mark.parametrize("plain", [False, True])
def test_a_damaged_cache_file_is_replaced_by_the_next_source_with_a_warning(
    tmp_path: Path, cache: Path, fashion: dict[str, bytes], capsys: pytest.CaptureFixture[str], plain: bool
) -> None:
    put(cache / "fashion-mnist", fashion)
    put(tmp_path / "installed", fashion)
    name, wrong = "t10k-labels-idx1-ubyte", idx_bytes(np.arange(10, dtype=np.uint8)[::-1])
    path = cache / "fashion-mnist" / (name if plain else f"{name}.gz")
    path.write_bytes(wrong if plain else gzip.compress(wrong))
    assert same(fashion, fashion_mnist.load())
    warning = capsys.readouterr().err
    assert f"expected SHA-256 {fashion_mnist.FILES[name]}" in warning
    assert f"got {hashlib.sha256(wrong).hexdigest()}" in warning
    assert same(fashion, fashion_mnist.load())
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("fashion")
def test_fashion_mnist_from_nowhere_is_one_line_that_names_every_source() -> None:
    with pytest.raises(DataError) as caught:
        fashion_mnist.load()
    message = str(caught.value)
    for part in ("the cache: not there", "Debian's package in", "not be reached", "no apt-get", "connect this machine"):
        assert part in message
    assert "\n" not in message


def fake_tools(folder: Path, package: Path, *, lists: bool) -> None:
    """apt-get and dpkg-deb that move local files; without lists, apt-get finds the package only after an update."""
    folder.mkdir()
    (folder / "apt-get").write_text(
        "#!/bin/sh\n"
        'for word; do case "$word" in update) touch updated; exit 0;; '
        f"download) if {'true' if lists else '[ -e updated ]'}; then touch dataset-fashion-mnist_1.deb; exit 0; fi; "
        "echo 'E: Unable to locate package' >&2; exit 100;; esac; done\n"
    )
    (folder / "dpkg-deb").write_text(f'#!/bin/sh\nmkdir -p "$3"{package}\ncp {package}/* "$3"{package}/\n')
    for tool in folder.iterdir():
        tool.chmod(0o755)


@pytest.mark.parametrize("lists", [True, False])
def test_debians_tools_are_the_last_source_with_or_without_package_lists(
    tmp_path: Path, cache: Path, fashion: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, lists: bool
) -> None:
    package = tmp_path / "package"
    put(package, fashion)
    fake_tools(tmp_path / "bin", package, lists=lists)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: f"/{name}")
    # What the package holds lies under this path inside of it; it does not exist outside.
    monkeypatch.setattr(fashion_mnist, "INSTALLED", package)
    real = fashion_mnist._read
    monkeypatch.setattr(fashion_mnist, "_read", lambda folder: real(folder if folder != package else tmp_path / "none"))
    assert same(fashion, fashion_mnist.load())
    assert (cache / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").exists()


def test_a_file_is_downloaded_if_its_sum_is_wrong_from_the_first_mirror_that_works(
    served: tuple[Path, str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (served[0] / "a").write_bytes(b"content")
    cache.mkdir()
    (cache / "a").write_bytes(b"damaged")
    md5 = hashlib.md5(b"content").hexdigest()
    mirrors = [f"{NOWHERE}/a", f"{served[1]}/none", f"{served[1]}/a"]
    assert download.verified(cache / "a", mirrors, md5=md5).read_bytes() == b"content"
    assert "is damaged" in capsys.readouterr().err
    assert download.verified(cache / "a", [f"{NOWHERE}/a"], md5=md5) == cache / "a"


def test_a_wrong_download_leaves_nothing_and_says_what_to_do(served: tuple[Path, str], cache: Path) -> None:
    (served[0] / "a").write_bytes(b"something else")
    with pytest.raises(DataError) as caught:
        download.verified(cache / "a", [f"{served[1]}/a"], md5="0" * 32)
    assert hashlib.md5(b"something else").hexdigest() in str(caught.value)
    assert f"put the file (MD5 {'0' * 32}) at {cache / 'a'}" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPCLUST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert download.cache() == Path("/x/deepclust")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert download.cache() == Path.home() / ".cache" / "deepclust"


@pytest.fixture
def unverified(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whatever lies in the cache is taken, by torchvision too, as if its sum were right."""
    monkeypatch.setattr(sources.download, "verified", lambda target, urls, md5: target)
    for kind in (datasets.SVHN, datasets.STL10):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    (cache / "svhn").mkdir(parents=True)
    return cache


def archive(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def planes(image: np.ndarray) -> bytes:
    """An (H, W, 3) image as CIFAR stores it: all of red, of green, of blue."""
    return b"".join(image[..., channel].tobytes() for channel in range(3))


def test_cifar_is_read_from_its_binary_files_with_its_fine_labels(unverified: Path) -> None:
    images = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    records = [bytes([number % 10]) + planes(image) for number, image in enumerate(images)]
    ten = {f"data_batch_{n}.bin": b"".join(records[2 * n - 2 : 2 * n]) for n in range(5, 0, -1)}
    ten |= {"test_batch.bin": b"".join(records[10:])}
    ten |= {"batches.meta.txt": ("\n".join(f"class{n}" for n in range(10)) + "\n\n").encode()}
    archive(unverified / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", ten)
    found = sources.load("CIFAR10")
    assert np.array_equal(found.images["train"], images[:10])
    assert np.array_equal(found.images["test"], images[10:])
    assert (found.labels["train"].tolist(), found.classes[3]) == (list(range(10)), "class3")
    assert found.paths["test"] == ["test/000000", "test/000001"]
    assert np.array_equal(found.read("train", 4, image_size=32, channels=3, resize="crop"), images[4])
    hundred = {name: bytes([7, label]) + planes(images[0]) for name, label in (("train.bin", 42), ("test.bin", 99))}
    hundred |= {"fine_label_names.txt": "\n".join(f"fine{n}" for n in range(100)).encode()}
    archive(unverified / "cifar-100-binary.tar.gz", "cifar-100-binary", hundred)
    found = sources.load("CIFAR100")
    assert (found.labels["train"].tolist(), found.labels["test"].tolist()) == ([42], [99])


def test_svhn_is_torchvisions_and_calls_its_tenth_digit_zero(unverified: Path) -> None:
    images = RNG.integers(0, 256, (32, 32, 3, 3), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(unverified / "svhn" / f"{split}_32x32.mat", {"X": images, "y": np.array([[10], [1], [9]], np.uint8)})
    found = sources.load("SVHN")
    assert found.labels["train"].tolist() == [0, 1, 9]
    for split in ("train", "test"):
        theirs = datasets.SVHN(unverified / "svhn", split)
        assert np.array_equal(found.images[split], theirs.data.transpose(0, 2, 3, 1))
        assert np.array_equal(found.labels[split], theirs.labels)


def test_stl10_is_torchvisions_with_its_unlabelled_images_in_train(
    unverified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"train": 2, "unlabeled": 3, "test": 1}
    monkeypatch.setattr(sources, "STL10_IMAGES", counts)
    files = {f"{name}_X.bin": RNG.bytes(count * 3 * 96 * 96) for name, count in counts.items()}
    files |= {"train_y.bin": bytes([1, 10]), "test_y.bin": bytes([5])}
    files |= {"class_names.txt": "\n".join(f"c{n}" for n in range(10)).encode()}
    archive(unverified / "stl10_binary.tar.gz", "stl10_binary", files)
    found = sources.load("STL10")
    with tarfile.open(unverified / "stl10_binary.tar.gz") as tar:
        tar.extractall(unverified, filter="data")
    for split, name in (("train", "train+unlabeled"), ("test", "test")):
        theirs = datasets.STL10(unverified, name)
        assert np.array_equal(found.images[split], theirs.data.transpose(0, 2, 3, 1))
        assert np.array_equal(found.labels[split], theirs.labels)
    assert found.classes == theirs.classes


def test_a_source_resizes_and_converts_what_is_asked_for(fashion: dict[str, bytes], cache: Path) -> None:
    put(cache / "fashion-mnist", fashion)
    found = sources.load("FashionMNIST")
    own = found.read("test", 1, image_size=28, channels=1, resize="crop")
    assert np.array_equal(found.read("test", 1, image_size=28, channels=3, resize="crop"), np.repeat(own, 3, axis=2))
    assert found.read("test", 1, image_size=14, channels=1, resize="crop").shape == (14, 14, 1)


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 1), (3, 1), (10, 1), (50, 5), (96, 10)])
def test_a_draw_takes_the_share_but_never_all_or_none_of_a_class(count: int, expected: int) -> None:
    labels = np.array([3] * count + [5] * 30)
    drawn = sampling.stratified(labels, 0.1, np.random.default_rng(0))
    assert np.bincount(labels[drawn], minlength=6)[[3, 5]].tolist() == [expected, 3]
    assert (np.diff(drawn) > 0).all()
    assert len(sampling.stratified(np.zeros(4, np.int64), 0.99, np.random.default_rng(0))) == 3
