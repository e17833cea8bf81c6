"""A folder of NumPy stacks: MedMNIST's layout of .npz files, or .npy files of unlabelled images.

An .npz holds `train_images`, (N, H, W) or (N, H, W, 3), and may hold `train_labels`, (N,) or (N, 1), and likewise
`val_*` and `test_*`. An .npy is one such array, of training images. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepclust.errors import DataError
from deepclust.images import decode, depth, find, npy
from deepclust.images.labels import means_none
from deepclust.images.readers import planes
from deepclust.images.reading import Reading, square
from deepclust.images.source import Source

_EXPECTED = "expected an array train_images of (N, H, W) or (N, H, W, 3) numbers"


class Part(NamedTuple):
    """The images of one array.

    Attributes:
        name: `pathmnist.npz/train`, or `stack.npy`.
        side: `train` or `test`.
        images: (N, H, W) or (N, H, W, C), of any depth; C is 1 or 3.
        labels: (N,) whole numbers, of which negative ones are unknown, or names; None if there are none.
    """

    name: str
    side: str
    images: NDArray[Any]
    labels: NDArray[Any] | None


@dataclass(frozen=True, kw_only=True)
class Stacks(Source):
    """Images of NumPy arrays, one array after the other.

    Attributes:
        parts: The arrays.
        starts: The number of each one's first image.
    """

    parts: list[Part]
    starts: list[int]

    def inspect(self, index: int, reading: Reading) -> decode.Inspected:
        """The id of an image that is no file is that of its pixels. Raises: DataError with the reason."""
        found = self._raw(index, reading)
        height, width = found.values.shape[:2]
        sha256 = hashlib.sha256(np.ascontiguousarray(found.values).data).hexdigest()
        return decode.Inspected(sha256, width, height, depth.measure(found) if found.is_deep else None, found.depth)

    def read(
        self, index: int, reading: Reading, *, image_sizes: Sequence[int], channels: int
    ) -> list[NDArray[np.uint8]]:
        """An image at each size; see `Source`. Raises: DataError with the reason."""
        image = Image.fromarray(depth.to_8_bits(self._raw(index, reading), reading.white))
        return [square(image, image_size=side, channels=channels, resize=reading.resize) for side in image_sizes]

    def _raw(self, index: int, reading: Reading) -> depth.Raw:
        number = bisect_right(self.starts, index) - 1
        return depth.raw(planes.chosen(self.parts[number].images[index - self.starts[number]], reading.bands))


def load(path: str, files: find.Files) -> Stacks:
    """The stacks of a folder.

    Args:
        path: The folder, as in params.yaml.
        files: What lies in it, with stacks.

    Raises:
        DataError: If there is no stack that can be read, more than one .npz, or one beyond memory.
    """
    root = Path(path)
    warnings = files.warnings_of_stage()
    parts: list[Part] = []
    for name in files.stacks:
        try:
            parts += _parts(root, name, warnings)
        except DataError as error:
            files.skip(name, str(error))
        except MemoryError as error:
            raise DataError(
                f"expected {name} to fit into memory, it does not; save its images as files or as .npy"
            ) from error
        except Exception:  # NumPy and its decoders raise many types on damaged files
            files.skip(name, "a damaged NumPy file")
    if not sum(len(part.images) for part in parts):
        left_out = "; ".join("{path}: {reason}".format(**item) for item in files.skipped[:1])
        raise DataError(f"expected images in the NumPy files of {root}, found none; {left_out or 'all are empty'}")
    alone = [part.name for part in parts if part.name in files.stacks]
    if len(folders := sorted({name.partition("/")[0] for name in alone if "/" in name})) > 1:
        warnings.append(
            f"taken as unlabelled training images: the .npy files in {', '.join(folders[:5])}"
            f"{' …' if len(folders) > 5 else ''}; if these are classes or sides, save one .npz with train_images and "
            "train_labels, test_images and test_labels"
        )
    archives = sorted({part.name.rpartition("/")[0] for part in parts if part.name not in files.stacks})
    if len(archives) > 1:
        raise DataError(
            f"expected one .npz of images in {root}, got {', '.join(archives)}, whose labels need not mean the same; "
            "keep one"
        )
    parts.sort(key=lambda part: part.side, reverse=True)  # train before test
    classes, labels = _labels(parts)
    sizes = [len(part.images) for part in parts]
    has_test = any(part.side == "test" for part in parts)
    return Stacks(
        name=root.name if root.is_absolute() else PurePosixPath(path).as_posix(),
        classes=classes,
        paths=[f"{part.name}/{index:06d}" for part in parts for index in range(len(part.images))],
        labels=labels,
        sides=[part.side for part in parts for _ in range(len(part.images))] if has_test else None,
        channels=None if any(part.images.shape[3:] == (3,) for part in parts) else 1,
        warnings=warnings,
        skipped=files.skipped,
        ignored=files.ignored,
        parts=parts,
        starts=[0, *accumulate(sizes)][:-1],
    )


def _parts(root: Path, name: str, warnings: list[str]) -> list[Part]:
    """The arrays of a file that are images. Raises: DataError or NumPy's errors if it has none, or is damaged."""
    held = npy.headers(root / name)
    if pickled := [array for array, header in held.items() if header.dtype.hasobject]:
        raise DataError(f"{pickled[0] or 'it'} holds Python objects, which are not unpickled; save numbers or text")
    if "" in held:
        images = np.load(root / name, mmap_mode="r", allow_pickle=False)
        return [Part(name, "train", _checked(images), None)]
    splits = [split for split in ("train", "test", "val") if f"{split}_images" in held]
    if "train" not in splits:
        raise DataError(f"{_EXPECTED}, got {', '.join(sorted(held)[:5]) or 'nothing'}; rename its arrays")
    if splits == ["train", "test", "val"]:
        warnings.append(f"not used beside train and test: val of {name}")
        splits.remove("val")
    with np.load(root / name, allow_pickle=False) as file:
        parts = []
        for split in splits:
            images = _checked(file[f"{split}_images"])
            labels = _column(file, f"{split}_labels", len(images)) if f"{split}_labels" in held else None
            parts.append(Part(f"{name}/{split}", "train" if split == "train" else "test", images, labels))
        return parts


def _checked(images: NDArray[Any]) -> NDArray[Any]:
    if images.dtype.kind not in "uif" or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise DataError(f"{_EXPECTED}, got {images.shape} of {images.dtype}; save its pictures so, or as files")
    if images.ndim == 3 and images.shape[2] in (1, 3, 4):
        raise DataError(
            f"{_EXPECTED}, got one picture of {images.shape}; save it as PNG or TIFF, or stack it with others"
        )
    return images


def _column(file: Mapping[str, NDArray[Any]], name: str, count: int) -> NDArray[Any]:
    """Labels as (N,)."""
    labels = file[name]
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise DataError(f"{name}: expected one label an image, got {labels.shape[1]}; save the file without its labels")
    if labels.shape not in ((count,), (count, 1)) or labels.dtype.kind not in "uiU":
        got = f"{labels.shape} of {labels.dtype}"
        raise DataError(f"{name}: expected {count} whole numbers or names, one an image, got {got}; mend the file")
    return labels.reshape(count)


def _labels(parts: list[Part]) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the classes, and (N,) numbers of them for all parts, -1 unknown."""
    found = [part.labels for part in parts if part.labels is not None]
    values = np.unique(np.concatenate(found)) if found else np.array([], np.int64)
    if values.dtype.kind == "U":
        classes = values[[not means_none(value) for value in values.tolist()]]
    else:
        classes = values[values >= 0]
    numbers = []
    for part in parts:
        column = np.full(len(part.images), -1, np.int64)
        if part.labels is not None:
            known = np.isin(part.labels, classes)
            column[known] = np.searchsorted(classes, part.labels[known])
        numbers.append(column)
    return [str(value) for value in classes], np.concatenate(numbers)
