"""The order of an epoch."""

import numpy as np
import torch

from deepclust.training import data


def test_an_epoch_holds_each_image_at_most_once_and_only_whole_batches_and_goes_on_inside() -> None:
    whole = list(data.batches(103, 10, seed=0, epoch=3))
    assert [len(batch) for batch in whole] == [10] * 10
    assert len(set(torch.cat(whole).tolist())) == 100
    rest = list(data.batches(103, 10, seed=0, epoch=3, first_step=2))
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    others = [torch.cat(list(data.batches(103, 10, seed=s, epoch=e))) for s, e in [(0, 4), (1, 3), (1, 4)]]
    assert len({tuple(order.tolist()) for order in (torch.cat(whole), *others)}) == 4


def test_a_batch_holds_the_images_of_its_indices() -> None:
    array = np.arange(5 * 2 * 2 * 1, dtype=np.uint8).reshape(5, 2, 2, 1)
    images = data.Images(array, torch.device("cpu"))
    assert images.batch(torch.tensor([3, 1])).numpy().tolist() == array[[3, 1]].tolist()
