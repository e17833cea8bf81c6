"""Features batch by batch, and written into one file by several processes."""

from functools import partial

import numpy as np
import pytest
import torch

from deepclust import distributed, seeding
from deepclust.errors import DataError, PeerError
from deepclust.models import features
from deepclust.models.encoder import Encoder
from tasks.embed import __main__ as embed
from tests import processes

CPU = torch.device("cpu")


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


def test_only_the_wanted_rows_are_embedded_a_batch_at_a_time_and_in_their_order():
    def means(batch):
        return torch.stack([batch.mean((1, 2, 3)), batch.amax((1, 2, 3))], 1)

    pixels = images(10).reshape(10, -1) / 255
    expected = np.stack([pixels.mean(1), pixels.max(1)], 1)
    found = list(features.batches(means, images(10), slice(3, 8), batch_size=2, device=CPU))
    assert [where for where, _ in found] == [slice(3, 5), slice(5, 7), slice(7, 8)]
    np.testing.assert_allclose(np.concatenate([rows for _, rows in found]), expected[3:8], rtol=1e-5)
    np.testing.assert_allclose(features.extract(means, images(10), batch_size=3, device=CPU), expected, 1e-5)
    with pytest.raises(DataError, match="at least one"):
        features.extract(means, images(0), batch_size=2, device=CPU)


def test_features_that_are_not_finite_name_their_image_among_all():
    pictures = np.zeros((10, 8, 8, 1), dtype=np.uint8)
    pictures[[6, 7]] = 255

    net = lambda batch: 1 / (1 - batch.mean((1, 2, 3)))[:, None]  # noqa: E731
    found = features.batches(net, pictures, slice(2, 10), batch_size=3, device=CPU)
    assert next(found)[1].flatten().tolist() == [1, 1, 1]
    with pytest.raises(DataError, match="image 6;"):
        next(found)


def encoder():
    with seeding.seeded(0):
        built = Encoder(backbone="small", image_size=8, channels=1, mean=[0.5], std=[0.25])
    return built.eval().requires_grad_(False)


def test_on_a_cpu_fewer_images_go_through_the_network_at_once_the_larger_it_takes_them():
    with seeding.seeded(0):
        large = Encoder(backbone="small", image_size=8, channels=1, mean=[0.5], std=[0.25], input_size=200).eval()
    found = list(features.batches(large, images(25), slice(0, 25), batch_size=12, device=CPU))
    assert [where.stop - where.start for where, _ in found] == [10, 10, 5], "400,000 pixels are 10 images of 200 a side"
    whole = large(features.to_float(torch.from_numpy(images(25)))).detach().numpy()
    np.testing.assert_allclose(np.concatenate([rows for _, rows in found]), whole, atol=1e-5)


def _embed(path, count, *, broken=False):
    net = encoder()
    if broken and distributed.rank() == 1:
        next(net.backbone.parameters()).fill_(torch.nan)
    try:
        return embed.embed(net, images(count), path, batch_size=4, device=CPU), ""
    except (DataError, OSError, PeerError) as error:
        return 0, f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(("world", "count"), [(2, 13), (4, 3)])
def test_processes_write_their_rows_of_one_file(world, count, tmp_path):
    assert processes.pool(world).run(_embed, tmp_path / "test.npy", count) == [(count, "")] * world
    expected = features.extract(encoder(), images(count), batch_size=count, device=CPU)
    np.testing.assert_allclose(np.load(tmp_path / "test.npy"), expected, rtol=1e-4, atol=1e-5)


def test_what_fails_on_one_process_fails_on_all(tmp_path):
    pool = processes.pool(2)
    (_, first), (_, second) = pool.run(partial(_embed, broken=True), tmp_path / "test.npy", 8)
    assert first.startswith("PeerError")
    assert second.startswith("DataError")
    assert "image 4;" in second
    (_, first), (_, second) = pool.run(_embed, tmp_path / "none" / "test.npy", 8)
    assert (first.partition(":")[0], second.partition(":")[0]) == ("FileNotFoundError", "PeerError")
