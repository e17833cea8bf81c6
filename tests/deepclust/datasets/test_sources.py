"""Named data sets: where they come from, and that damaged files are never taken."""

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

from deepclust.datasets import download, fashion_mnist, idx, sources
from deepclust.errors import DataError
from deepclust.images import sampling

RNG = np.random.default_rng(0)


def idx_bytes(array: np.ndarray) -> bytes:
    """The format as its author describes it: two zeros, the type, the number of dimensions, their sizes, the values."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPCLUST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which a server on this machine gives its files."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
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
@pytest.mark.parametrize("zipped", [False, True])
def test_an_idx_file_is_read_as_it_was_written(tmp_path: Path, shape: tuple[int, ...], zipped: bool) -> None:
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / ("a.gz" if zipped else "a")
    path.write_bytes(gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))
    assert np.array_equal(idx.read(path, sha256=hashlib.sha256(idx_bytes(array)).hexdigest()), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(np.zeros(5, np.uint8))[:-1], "expected 5 bytes for its shape"),
        (idx_bytes(np.zeros(5, np.uint8)) + b"x", "expected 5 bytes for its shape"),
        (b"\x00\x00\x0d\x01" + bytes(8), "an IDX file of unsigned bytes"),
        (b"\x00\x00\x08\x03\x00", "an IDX file of unsigned bytes"),
        (b"", "an IDX file of unsigned bytes"),
    ],
)
def test_a_damaged_idx_file_is_one_line_of_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=message):
        idx.read(tmp_path / "a")


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"no gzip" + b, lambda b: b[:40] + b"xxxx" + b[44:]])
def test_a_damaged_gzip_file_is_one_line_of_error(tmp_path: Path, damage: object) -> None:
    content = gzip.compress(idx_bytes(RNG.integers(0, 256, 500, dtype=np.uint8)))
    (tmp_path / "a.gz").write_bytes(damage(content))  # type: ignore[operator]
    with pytest.raises(DataError, match="is damaged: expected gzip"):
        idx.read(tmp_path / "a.gz")


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small Fashion-MNIST with pins of its own, no package, no download and no Debian."""
    files = {
        "train-images-idx3-ubyte": idx_bytes(RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8)),
        "train-labels-idx1-ubyte": idx_bytes(np.arange(20, dtype=np.uint8) % 10),
        "t10k-images-idx3-ubyte": idx_bytes(RNG.integers(0, 256, (10, 28, 28), dtype=np.uint8)),
        "t10k-labels-idx1-ubyte": idx_bytes(np.arange(10, dtype=np.uint8)),
    }
    monkeypatch.setattr(fashion_mnist, "FILES", {name: hashlib.sha256(c).hexdigest() for name, c in files.items()})
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "installed")
    monkeypatch.setattr(fashion_mnist, "MIRROR", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: None)
    return files


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))


def same(files: dict[str, bytes], arrays: fashion_mnist.Arrays) -> bool:
    return all(idx_bytes(arrays[name]) == content for name, content in files.items())


def test_fashion_mnist_comes_from_the_cache_first(cache: Path, fashion: dict[str, bytes]) -> None:
    put(cache / "fashion-mnist", fashion)
    assert same(fashion, fashion_mnist.load())


def test_fashion_mnist_comes_from_the_installed_package(
    tmp_path: Path, cache: Path, fashion: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "installed", fashion)
    assert same(fashion, fashion_mnist.load())
    assert not cache.exists()
    assert capsys.readouterr().err == ""


def test_a_download_is_kept_in_the_cache(
    served: tuple[Path, str], cache: Path, fashion: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(served[0], fashion)
    monkeypatch.setattr(fashion_mnist, "MIRROR", served[1])
    assert same(fashion, fashion_mnist.load())
    monkeypatch.setattr(fashion_mnist, "MIRROR", "http://127.0.0.1:1")
    assert same(fashion, fashion_mnist.load())
    assert sorted(path.name for path in (cache / "fashion-mnist").iterdir()) == sorted(f"{name}.gz" for name in fashion)


@pytest.mark.parametrize("plain", [False, True])
def test_a_damaged_cache_file_is_replaced_by_the_next_source_with_a_warning(
    tmp_path: Path, cache: Path, fashion: dict[str, bytes], capsys: pytest.CaptureFixture[str], plain: bool
) -> None:
    cached = cache / "fashion-mnist"
    put(cached, fashion)
    name = "t10k-labels-idx1-ubyte"
    wrong = idx_bytes(np.arange(10, dtype=np.uint8)[::-1])
    (cached / (name if plain else f"{name}.gz")).write_bytes(wrong if plain else gzip.compress(wrong))
    put(tmp_path / "installed", fashion)
    assert same(fashion, fashion_mnist.load())
    warning = capsys.readouterr().err
    assert f"expected SHA-256 {fashion_mnist.FILES[name]}" in warning
    assert f"got {hashlib.sha256(wrong).hexdigest()}" in warning
    assert same(fashion, fashion_mnist.load())
    assert capsys.readouterr().err == ""


def test_a_damaged_download_is_never_kept(
    served: tuple[Path, str], cache: Path, fashion: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(served[0], fashion | {"t10k-images-idx3-ubyte": b"something else"})
    monkeypatch.setattr(fashion_mnist, "MIRROR", served[1])
    with pytest.raises(DataError, match="expected SHA-256"):
        fashion_mnist.load()
    assert not cache.exists()


def test_fashion_mnist_from_nowhere_is_one_line_that_names_every_source(fashion: dict[str, bytes]) -> None:
    with pytest.raises(DataError) as caught:
        fashion_mnist.load()
    message = str(caught.value)
    for part in (
        "the cache: not there",
        "Debian's package in",
        "can not be reached",
        "no apt-get",
        "connect this machine",
    ):
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


def test_a_file_of_the_right_sum_is_not_downloaded_again(cache: Path) -> None:
    cache.mkdir()
    (cache / "a").write_bytes(b"content")
    md5 = hashlib.md5(b"content").hexdigest()
    assert download.verified(cache / "a", ["http://127.0.0.1:1/a"], md5=md5) == cache / "a"


def test_a_damaged_file_is_downloaded_again_from_the_first_mirror_that_works(
    served: tuple[Path, str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (served[0] / "a").write_bytes(b"content")
    cache.mkdir()
    (cache / "a").write_bytes(b"damaged")
    mirrors = ["http://127.0.0.1:1/a", f"{served[1]}/none", f"{served[1]}/a"]
    path = download.verified(cache / "a", mirrors, md5=hashlib.md5(b"content").hexdigest())
    assert path.read_bytes() == b"content"
    assert "is damaged" in capsys.readouterr().err


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


def archive(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what lies in the cache, as if its sum were right."""
    monkeypatch.setattr(sources.download, "verified", lambda target, urls, md5: target)


def planes(image: np.ndarray) -> bytes:
    """An (H, W, 3) image as CIFAR stores it: all of red, of green, of blue."""
    return b"".join(image[..., channel].tobytes() for channel in range(3))


def test_cifar10_is_read_from_its_binary_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unverified(monkeypatch)
    images = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    records = [bytes([number % 10]) + planes(image) for number, image in enumerate(images)]
    folder = "cifar-10-batches-bin"
    files = {f"{folder}/data_batch_{n}.bin": b"".join(records[2 * n - 2 : 2 * n]) for n in range(5, 0, -1)}
    files |= {f"{folder}/test_batch.bin": b"".join(records[10:])}
    files |= {f"{folder}/batches.meta.txt": ("\n".join(f"class{n}" for n in range(10)) + "\n\n").encode()}
    archive(cache / "cifar-10-binary.tar.gz", files)
    found = sources.load("CIFAR10")
    assert np.array_equal(found.images["train"], images[:10])
    assert np.array_equal(found.images["test"], images[10:])
    assert found.labels["train"].tolist() == list(range(10))
    assert found.classes[3] == "class3"
    assert found.paths["test"] == ["test/000000", "test/000001"]
    assert np.array_equal(found.read("train", 4, image_size=32, channels=3, resize="crop"), images[4])


def test_cifar100_has_its_fine_labels(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unverified(monkeypatch)
    image = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    names = "\n".join(f"fine{n}" for n in range(100)).encode()
    files = {"train.bin": bytes([7, 42]) + planes(image), "test.bin": bytes([1, 99]) + planes(image)}
    files |= {"fine_label_names.txt": names}
    archive(cache / "cifar-100-binary.tar.gz", {f"cifar-100-binary/{name}": c for name, c in files.items()})
    found = sources.load("CIFAR100")
    assert (found.labels["train"].tolist(), found.labels["test"].tolist()) == ([42], [99])


def test_an_archive_without_its_files_is_one_line_of_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unverified(monkeypatch)
    archive(cache / "cifar-10-binary.tar.gz", {"../escaped": b"x"})
    with pytest.raises(DataError, match=r"expected cifar-10-batches-bin/batches\.meta\.txt"):
        sources.load("CIFAR10")
    assert not (cache.parent / "escaped").exists()


def test_svhn_calls_its_tenth_digit_zero(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    unverified(monkeypatch)
    images = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    (cache / "svhn").mkdir(parents=True)
    for split in ("train", "test"):
        content = {"X": images.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [9]], np.uint8)}
        savemat(cache / "svhn" / f"{split}_32x32.mat", content)
    found = sources.load("SVHN")
    assert found.labels["train"].tolist() == [0, 1, 9]
    assert np.array_equal(found.images["test"], images)


def test_stl10s_unlabelled_images_belong_to_train(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unverified(monkeypatch)
    counts = {"train": 2, "unlabeled": 3, "test": 1}
    monkeypatch.setattr(sources, "STL10_IMAGES", counts)
    images = {name: RNG.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8) for name, count in counts.items()}
    files = {f"{name}_X.bin": array.transpose(0, 3, 2, 1).tobytes() for name, array in images.items()}
    files |= {"train_y.bin": bytes([1, 10]), "test_y.bin": bytes([5])}
    files |= {"class_names.txt": "\n".join(f"c{n}" for n in range(10)).encode()}
    archive(cache / "stl10_binary.tar.gz", {f"stl10_binary/{name}": content for name, content in files.items()})
    found = sources.load("STL10")
    assert np.array_equal(found.images["train"], np.concatenate([images["train"], images["unlabeled"]]))
    assert np.array_equal(found.images["test"], images["test"])
    assert found.labels["train"].tolist() == [0, 9, -1, -1, -1]
    assert found.labels["test"].tolist() == [4]


def test_a_source_resizes_and_converts_what_is_asked_for(fashion: dict[str, bytes], cache: Path) -> None:
    put(cache / "fashion-mnist", fashion)
    found = sources.load("FashionMNIST")
    own = found.read("test", 1, image_size=28, channels=1, resize="crop")
    assert np.array_equal(found.read("test", 1, image_size=28, channels=3, resize="crop"), np.repeat(own, 3, axis=2))
    assert found.read("test", 1, image_size=14, channels=1, resize="crop").shape == (14, 14, 1)


def test_labels_beyond_the_classes_are_one_line_of_error(monkeypatch: pytest.MonkeyPatch) -> None:
    part = (np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 10]))
    monkeypatch.setitem(sources.LOADERS, "MNIST", lambda: (sources.DIGITS, part, part))
    with pytest.raises(DataError, match="below 10"):
        sources.load("MNIST")


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 1), (3, 1), (10, 1), (50, 5), (96, 10)])
def test_a_draw_takes_the_share_but_never_all_or_none_of_a_class(count: int, expected: int) -> None:
    labels = np.array([3] * count + [5] * 30)
    drawn = sampling.stratified(labels, 0.1, np.random.default_rng(0))
    assert (labels[drawn] == 3).sum() == expected
    assert (labels[drawn] == 5).sum() == 3
    assert (np.diff(drawn) > 0).all()


def test_a_draw_near_one_still_leaves_an_item() -> None:
    assert len(sampling.stratified(np.zeros(4, np.int64), 0.99, np.random.default_rng(0))) == 3
