"""Data sets by name, read from their published binary files: no pickle, no path taken from an archive.

torchvision's classes read the same arrays, which the tests compare, but: its CIFAR unpickles, its MNIST wants unpacked
files that it does not check, its SVHN hashes once more what `download.verified` has hashed, and its STL10 holds 3 GB in
memory.

The SHA-256 sums are those that TensorFlow Datasets publishes (github.com/tensorflow/datasets,
tensorflow_datasets/url_checksums/{mnist,kmnist,cifar10,cifar100,svhn_cropped,stl10}.txt).
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepclust.datasets import download, fashion_mnist, idx
from deepclust.images import decode
from deepclust.images.reading import Reading, square
from deepclust.images.source import Source

Parts = tuple[NDArray[np.uint8], NDArray[np.int64]]
STL10_IMAGES = {"train": 5000, "unlabeled": 100000, "test": 8000}
DIGITS = [str(digit) for digit in range(10)]
TORONTO = "https://www.cs.toronto.edu/~kriz"


@dataclass(frozen=True, kw_only=True)
class Named(Source):
    """A data set by name.

    Attributes:
        images: (N, H, W, C) uint8 of `train` and `test`, in this order.
    """

    images: dict[str, NDArray[np.uint8]]

    def inspect(self, index: int, reading: Reading) -> decode.Inspected:
        """The id of an image that is no file is that of its pixels; none has more than 8 bits."""
        pixels = self._pixels(index)
        return decode.Inspected(hashlib.sha256(pixels.data).hexdigest(), pixels.shape[1], pixels.shape[0], None)

    def read(
        self, index: int, reading: Reading, *, image_sizes: Sequence[int], channels: int
    ) -> list[NDArray[np.uint8]]:
        """An image at each size, of which its own are its very pixels; see `Source`."""
        pixels = self._pixels(index)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return [
            pixels
            if pixels.shape == (side, side, channels)
            else square(image, image_size=side, channels=channels, resize=reading.resize)
            for side in image_sizes
        ]

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        train, test = self.images["train"], self.images["test"]
        return np.ascontiguousarray(train[index] if index < len(train) else test[index - len(train)])


def load(name: str) -> Named:
    """Get a data set, from the cache or its publisher.

    Raises:
        DataError: If it can not be had whole: no file is read whose sum is not the published one.
    """
    classes, train, test = LOADERS[name]()
    parts = {"train": train, "test": test}
    return Named(
        name=name,
        classes=classes,
        paths=[f"{split}/{index:06d}" for split, (images, _) in parts.items() for index in range(len(images))],
        labels=np.concatenate([labels for _, labels in parts.values()]),
        sides=[split for split, (_, labels) in parts.items() for _ in labels],
        published=True,
        image_size=train[0].shape[1],
        channels=train[0].shape[3],
        images={split: images for split, (images, _) in parts.items()},
    )


def _mnists(part: str, arrays: fashion_mnist.Arrays) -> Parts:
    """Images and labels of `train` or `t10k`, which all three data sets of this kind call alike."""
    return arrays[f"{part}-images-idx3-ubyte"][..., None], arrays[f"{part}-labels-idx1-ubyte"].astype(np.int64)


def _fashion_mnist() -> tuple[list[str], Parts, Parts]:
    arrays = fashion_mnist.load()
    return fashion_mnist.CLASSES, _mnists("train", arrays), _mnists("t10k", arrays)


def _idx(folder: str, mirrors: list[str], classes: list[str], sha256: dict[str, str]) -> tuple[list[str], Parts, Parts]:
    arrays = {}
    for name, sum_ in sha256.items():
        urls = [f"{mirror}/{name}.gz" for mirror in mirrors]
        arrays[name] = idx.read(download.verified(download.cache() / folder / f"{name}.gz", urls, sha256=sum_))
    return classes, _mnists("train", arrays), _mnists("t10k", arrays)


def _mnist() -> tuple[list[str], Parts, Parts]:
    mirrors = [
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
    ]
    sha256 = {
        "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }
    return _idx("mnist", mirrors, DIGITS, sha256)


def _kmnist() -> tuple[list[str], Parts, Parts]:
    sha256 = {
        "train-images-idx3-ubyte": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "train-labels-idx1-ubyte": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "t10k-images-idx3-ubyte": "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "t10k-labels-idx1-ubyte": "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    }
    classes = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]
    return _idx("kmnist", _encrypted_first("codh.rois.ac.jp/kmnist/dataset/kmnist"), classes, sha256)


def _encrypted_first(place: str) -> list[str]:
    """Both addresses of a host that publishes its own as http: where https is not answered, the SHA-256 is enough."""
    return [f"https://{place}", f"http://{place}"]


def _archive(name: str, url: str, sha256: str) -> Path:
    return download.verified(download.cache() / name, [f"{url}/{name}"], sha256=sha256)


def _members(archive: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Whole members of a tar, which is read once from its start to its end."""
    with tarfile.open(archive) as tar:
        wanted = ((member.name, tar.extractfile(member)) for member in tar if member.name in names)
        return {name: file.read() for name, file in wanted if file}


def _records(content: bytes, label_bytes: int) -> Parts:
    """CIFAR's records: labels, of which the last is the finest, then 32 x 32 red, green and blue."""
    records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + 3 * 32 * 32)
    pixels = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return pixels, records[:, label_bytes - 1].astype(np.int64)


def _cifar10() -> tuple[list[str], Parts, Parts]:
    url, sha256 = TORONTO, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    folder = "cifar-10-batches-bin"
    names = [f"{folder}/data_batch_{number}.bin" for number in range(1, 6)]
    archive = _archive("cifar-10-binary.tar.gz", url, sha256)
    files = _members(archive, [*names, f"{folder}/test_batch.bin", f"{folder}/batches.meta.txt"])
    train = _records(b"".join(files[name] for name in names), 1)
    return files[f"{folder}/batches.meta.txt"].decode().split(), train, _records(files[f"{folder}/test_batch.bin"], 1)


def _cifar100() -> tuple[list[str], Parts, Parts]:
    url, sha256 = TORONTO, "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
    names = [f"cifar-100-binary/{name}" for name in ("train.bin", "test.bin", "fine_label_names.txt")]
    files = _members(_archive("cifar-100-binary.tar.gz", url, sha256), names)
    return files[names[2]].decode().split(), _records(files[names[0]], 2), _records(files[names[1]], 2)


def _svhn() -> tuple[list[str], Parts, Parts]:
    from scipy.io import loadmat

    sha256 = {
        "train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        "test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    }
    parts = []
    for name, sum_ in sha256.items():
        urls = _encrypted_first(f"ufldl.stanford.edu/housenumbers/{name}")
        content = loadmat(download.verified(download.cache() / "svhn" / name, urls, sha256=sum_))
        labels = content["y"].astype(np.int64).ravel() % 10  # the digit 0 is published as 10
        parts.append((content["X"].transpose(3, 0, 1, 2), labels))
    return DIGITS, parts[0], parts[1]


def _stl10() -> tuple[list[str], Parts, Parts]:
    """The 100,000 images of its unlabelled split belong to train."""
    archive = _archive(
        "stl10_binary.tar.gz",
        "https://ai.stanford.edu/~acoates/stl10",
        "f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
    )
    names = [f"stl10_binary/{name}" for name in ("train_y.bin", "test_y.bin", "class_names.txt")]
    small = _members(archive, names)
    train_labels, test_labels = (np.frombuffer(small[name], np.uint8).astype(np.int64) - 1 for name in names[:2])
    train = _stl10_images(archive, "train", ["train", "unlabeled"])
    test = _stl10_images(archive, "test", ["test"])
    labels = np.concatenate([train_labels, np.full(len(train) - len(train_labels), -1)])
    return small[names[2]].decode().split(), (train, labels), (test, test_labels)


def _stl10_images(archive: Path, split: str, parts: list[str]) -> NDArray[np.uint8]:
    """Parts one after the other as a memory-mapped file: together they are 3 GB."""
    target = download.cache() / f"stl10-{split}.bin"
    size = sum(STL10_IMAGES[part] for part in parts) * 3 * 96 * 96
    if not (target.exists() and target.stat().st_size == size):
        print(f"unpacking {archive.name} ({split})", flush=True)
        partial = target.with_suffix(".partial")
        with partial.open("wb") as file:
            for part in parts:
                with (
                    tarfile.open(archive) as tar,
                    tar.extractfile(f"stl10_binary/{part}_X.bin") or io.BytesIO() as member,
                ):
                    shutil.copyfileobj(member, file)
        partial.replace(target)
    columns_first = np.memmap(target, np.uint8, "r").reshape(-1, 3, 96, 96)  # as MATLAB stores them
    return columns_first.transpose(0, 3, 2, 1)


LOADERS: dict[str, Callable[[], tuple[list[str], Parts, Parts]]] = {
    "FashionMNIST": _fashion_mnist,
    "MNIST": _mnist,
    "KMNIST": _kmnist,
    "CIFAR10": _cifar10,
    "CIFAR100": _cifar100,
    "SVHN": _svhn,
    "STL10": _stl10,
}
