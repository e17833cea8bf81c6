"""Features of all prepared images by one encoder.

python -m tasks.embed swav

Several processes each write a share of one file, so they need a common folder.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deepclust import distributed
from deepclust.errors import CheckpointError
from deepclust.evaluation import metrics
from deepclust.models import encoder, features
from deepclust.models.devices import default_device
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout, prepared, stage


def main() -> None:
    """Run the stage."""
    with stage.running("embed") as here:
        assert here.encoder
        device = default_device()
        trained = encoder.load(layout.out("pretrain", here.encoder)).to(device)
        # Up to three times faster convolutions on a CPU; torch's stub lacks the overload.
        trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        shape = tuple(trained.description[name] for name in ("image_size", "image_size", "channels"))
        total, seconds = 0, 0.0
        for split in layout.SPLITS:
            images = prepared.images(split, here.encoder)
            if images.shape[1:] != shape:
                raise CheckpointError(
                    f"expected an encoder of images {images.shape[1:]}, got one of {shape}; run "
                    f"`dvc repro pretrain@{here.encoder}`"
                )
            begin = time.monotonic()
            count = embed(
                trained,
                images,
                here.folder / f"{split}.npy",
                batch_size=here.params.embed.batch_size,
                device=device,
            )
            total, seconds = total + count, seconds + time.monotonic() - begin
            say(f"{here.encoder}: {count} {split} images embedded in {trained.feature_dim} dimensions")
        here.cost(images=total, embedding_seconds=seconds)
        with distributed.together():
            if distributed.is_main():
                embedded = np.load(here.folder / f"{layout.SPLITS[-1]}.npy", mmap_mode="r", allow_pickle=False)
                here.metrics({"dim": trained.feature_dim, "rankme": metrics.rankme(embedded)})


def embed(
    trained: encoder.Encoder, images: NDArray[np.uint8], path: Path, *, batch_size: int, device: torch.device
) -> int:
    """Write the features of images as .npy; each process writes its share of the rows, a batch at a time.

    Returns:
        Number of images, of all processes together.

    Raises:
        DataError: If there are no images, or a feature is not finite.
    """
    with distributed.together():
        if distributed.is_main():
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(images), trained.feature_dim))
    with distributed.together(), _File(path) as rows:
        share = distributed.share(len(images))
        for where, embedded in features.batches(trained, images, share, batch_size=batch_size, device=device):
            rows[where] = embedded
    return len(images)


class _File:
    """The rows of a float32 .npy file, written with `write` and not through a memory map.

    With a memory map, a full disk would kill the process, and on a network file system two machines would overwrite
    each other's rows in the memory pages that they share.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b")
        version = np.lib.format.read_magic(self._file)
        assert version == (1, 0)
        shape, _, _ = np.lib.format.read_array_header_1_0(self._file)
        self._start, self._width = self._file.tell(), 4 * shape[1]

    def __setitem__(self, where: slice, rows: NDArray[np.float32]) -> None:
        self._file.seek(self._start + where.start * self._width)
        self._file.write(rows.astype(np.float32, order="C", copy=False).tobytes())

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


if __name__ == "__main__":
    main()
