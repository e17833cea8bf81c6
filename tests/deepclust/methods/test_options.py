"""What is left at `auto` is decided by the data, what is stated is kept, and sizes that do not fit are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepclust.errors import ConfigError
from deepclust.methods import config_class, method_class
from deepclust.training.optim import SGD


def sized(method: str, **options: Any) -> Any:
    options = {"epochs": 6, "batch_size": 64} | options
    return config_class(method)(**options).sized(images=60_000, image_size=28)


def test_automatic_sizes_are_those_of_the_rule() -> None:
    swav = sized("swav", queue_start_epoch=1)
    assert (swav.prototypes, swav.queue_length) == ((100,), 64)
    pcl = sized("pcl", batch_size=256, warmup_epochs=1)
    assert (pcl.clusters, pcl.negatives, pcl.queue_length) == ((500, 1000, 2000), 244, 4096)
    assert sized("deepcluster_v2").prototypes == (100, 100, 100), "it has three heads of its own accord"
    assert sized("moco").queue_length == 4032


def test_stated_sizes_are_kept() -> None:
    assert sized("swav", prototypes=30, queue_length=0).counts == (30,)
    assert sized("swav", prototypes=[20, 40]).counts == (20, 40)
    assert sized("moco", queue_length=128).queue_length == 128


def test_parts_of_a_batch_count_for_the_negatives_not_the_whole() -> None:
    assert sized("pcl", clusters=[300], batch_size=256, accumulate=4, warmup_epochs=1).negatives == 300 - 64


def test_automatic_clusters_with_too_many_stated_negatives_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"with 256 images at once not exceed 244: .* 500, .* got 5000"):
        sized("pcl", negatives=5000, batch_size=256, warmup_epochs=1)


def test_a_queue_that_would_never_be_used_is_refused_if_stated_and_left_out_if_automatic() -> None:
    late = {"prototypes": 100, "queue_start_epoch": 99}
    assert sized("swav", **late).queue_length == 0
    with pytest.raises(ConfigError, match=r"queue_length: from queue_start_epoch 99 on, 0 embeddings .* of 64"):
        sized("swav", queue_length=64, **late)


@pytest.mark.parametrize("name", ["freeze_prototypes_steps", "hard_assignment_steps"])
def test_first_steps_that_are_the_whole_run_are_refused(name: str) -> None:
    assert sized("swav", **{name: 6 * 937 - 1})
    with pytest.raises(ConfigError, match=f"{name}: expected less than the 5622 updates"):
        sized("swav", **{name: 6 * 937})


def test_a_method_is_not_built_from_sizes_that_nobody_decided() -> None:
    with pytest.raises(ConfigError, match=r"^queue_length, clusters, negatives: .* got 'auto'.*sized"):
        method_class("pcl")(torch.nn.Flatten(), 8, config_class("pcl")())


def test_a_warm_up_as_long_as_the_run_and_parts_that_are_not_equal_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimiser\.warmup_epochs 2 must be below epochs 2"):
        config_class("simsiam")(epochs=2, optimiser=SGD(warmup_epochs=2))
    for accumulate in (3, 64):
        with pytest.raises(ConfigError, match=f"accumulate {accumulate} must divide batch_size 64 into equal parts of"):
            config_class("simsiam")(batch_size=64, accumulate=accumulate)
