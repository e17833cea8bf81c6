"""Features written into an array batch by batch, by one process or several, against those in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepclust import distributed, seeding
from deepclust.errors import DataError, PeerError
from deepclust.models import features
from deepclust.models.encoder import Encoder
from tasks.embed import __main__ as embed
from tests import processes

CPU = torch.device("cpu")


def images(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


class Means(nn.Module):
    """Mean and largest value of each image, and how many images came at once."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, batch: Tensor) -> Tensor:
        self.batches.append(len(batch))
        return torch.stack([batch.mean((1, 2, 3)), batch.amax((1, 2, 3))], 1)


def test_only_the_wanted_rows_are_written_a_batch_at_a_time() -> None:
    whole, encoder = np.full((10, 2), 7, dtype=np.float32), Means()
    features.extract_into(whole, encoder, images(10), rows=slice(3, 8), batch_size=2, device=CPU)
    assert encoder.batches == [2, 2, 1]
    assert (whole[:3] == 7).all()
    assert (whole[8:] == 7).all()
    expected = images(10)[3:8].reshape(5, -1) / 255
    np.testing.assert_allclose(whole[3:8], np.stack([expected.mean(1), expected.max(1)], 1), rtol=1e-5)
    assert (features.extract(Means(), images(10), batch_size=2, device=CPU)[3:8] == whole[3:8]).all()


def test_no_rows_ask_nothing_of_the_encoder_but_no_images_are_refused() -> None:
    whole, encoder = np.zeros((4, 2), dtype=np.float32), Means()
    features.extract_into(whole, encoder, images(4), rows=slice(2, 2), batch_size=2, device=CPU)
    assert encoder.batches == []
    with pytest.raises(DataError, match="at least one"):
        features.extract_into(whole[:0], encoder, images(0), rows=slice(0, 0), batch_size=2, device=CPU)
    with pytest.raises(DataError, match="at least one"):
        features.extract(encoder, images(0), batch_size=2, device=CPU)


def test_features_that_are_not_finite_name_their_image_among_all() -> None:
    pictures = np.zeros((10, 8, 8, 1), dtype=np.uint8)
    pictures[[6, 7]] = 255
    whole = np.zeros((10, 1), dtype=np.float32)

    def diverged(batch: Tensor) -> Tensor:
        return 1 / (1 - batch.mean((1, 2, 3)))[:, None]

    with pytest.raises(DataError, match="image 6;"):
        features.extract_into(whole, diverged, pictures, rows=slice(2, 10), batch_size=3, device=CPU)
    assert whole.flatten().tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    with pytest.raises(DataError, match="image 6;"):
        features.extract(diverged, pictures, batch_size=4, device=CPU)


def encoder() -> Encoder:
    """A small network whose normalisation has seen something."""
    with seeding.seeded(0):
        built = Encoder(backbone="small", image_size=8, channels=1, mean=[0.5], std=[0.25])
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2, generator=seeding.generator("variances"))
    return built.eval().requires_grad_(False)


def _embed(path: Path, count: int) -> int:
    return embed.embed(encoder(), images(count), path, batch_size=4, device=CPU)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("count", [3, 13])
def test_processes_write_their_rows_of_one_file_that_is_the_one_of_numpy(
    world: int, count: int, tmp_path: Path
) -> None:
    path = tmp_path / "test.npy"
    if world == 1:
        assert _embed(path, count) == count
    else:
        assert processes.pool(world).run(_embed, path, count) == [count] * world
    expected = features.extract(encoder(), images(count), batch_size=count, device=CPU)
    found = np.load(path)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert len(np.unique(found, axis=0)) == count
    np.save(tmp_path / "numpy.npy", found)
    assert path.read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def _embed_with_one_diverged(path: Path) -> tuple[str, str]:
    broken = encoder()
    if distributed.rank() == 1:
        next(broken.backbone.parameters()).fill_(torch.nan)
    try:
        embed.embed(broken, images(8), path, batch_size=4, device=CPU)
    except (DataError, PeerError) as error:
        return type(error).__name__, str(error)
    return "none", ""


def test_features_that_diverge_on_one_process_fail_on_all(tmp_path: Path) -> None:
    (first, _), (second, message) = processes.pool(2).run(_embed_with_one_diverged, tmp_path / "test.npy")
    assert (first, second) == ("PeerError", "DataError")
    assert "image 4;" in message


def _embed_into_nowhere(path: Path) -> str:
    try:
        embed.embed(encoder(), images(8), path, batch_size=4, device=CPU)
    except (OSError, PeerError) as error:
        return type(error).__name__
    return "none"


def test_a_file_that_can_not_be_made_fails_on_all(tmp_path: Path) -> None:
    assert processes.pool(2).run(_embed_into_nowhere, tmp_path / "none" / "test.npy") == [
        "FileNotFoundError",
        "PeerError",
    ]
