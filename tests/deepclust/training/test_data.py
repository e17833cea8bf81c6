"""The order of an epoch."""

import numpy as np
import pytest
import torch

from deepclust.errors import ConfigError
from deepclust.training import data


def test_an_epoch_holds_each_image_at_most_once_and_only_whole_batches() -> None:
    batches = list(data.batches(103, 10, seed=1, epoch=0))
    assert [len(batch) for batch in batches] == [10] * 10
    assert len(set(torch.cat(batches).tolist())) == 100


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    order = {
        (seed, epoch): torch.cat(list(data.batches(50, 10, seed=seed, epoch=epoch))).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(value) for value in order.values()}) == 4
    assert order[1, 1] == torch.cat(list(data.batches(50, 10, seed=1, epoch=1))).tolist()


def test_going_on_inside_an_epoch_gives_the_rest_of_it() -> None:
    whole = list(data.batches(50, 10, seed=0, epoch=3))
    rest = list(data.batches(50, 10, seed=0, epoch=3, first_step=2))
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_a_batch_larger_than_the_data_set_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"30.*got 64"):
        data.steps_per_epoch(30, 64)


def test_a_batch_holds_the_images_of_its_indices() -> None:
    array = np.arange(5 * 2 * 2 * 1, dtype=np.uint8).reshape(5, 2, 2, 1)
    images = data.Images(array, torch.device("cpu"))
    assert images.batch(torch.tensor([3, 1])).numpy().tolist() == array[[3, 1]].tolist()
