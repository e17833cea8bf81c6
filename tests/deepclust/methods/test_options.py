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


def test_automatic_sizes_are_those_of_the_rule_and_stated_ones_are_kept() -> None:
    swav = sized("swav", queue_start_epoch=1)
    assert (swav.prototypes, swav.queue_length) == ((100,), 64)
    pcl = sized("pcl", batch_size=256, warmup_epochs=1)
    assert (pcl.clusters, pcl.negatives, pcl.queue_length) == ((500, 1000, 2000), 244, 4096)
    assert sized("deepcluster_v2").prototypes == (100, 100, 100), "it has three heads of its own accord"
    assert sized("moco").queue_length == 4032
    assert sized("swav", prototypes=30, queue_length=0).counts == (30,)
    assert sized("moco", queue_length=128).queue_length == 128
    assert sized("swav", prototypes=100, queue_start_epoch=99).queue_length == 0, "it would never be used"
    assert sized("swav", freeze_prototypes_steps=6 * 937 - 1, hard_assignment_steps=6 * 937 - 1)
    # Negatives are left by what is computed at once.
    assert sized("pcl", clusters=[300], batch_size=256, accumulate=4, warmup_epochs=1).negatives == 300 - 64


NEVER = {"prototypes": 100, "queue_start_epoch": 99, "queue_length": 64}
NEGATIVES = {"negatives": 5000, "batch_size": 256, "warmup_epochs": 1}


@pytest.mark.parametrize(
    ("said", "method", "options"),
    [
        (r"with 256 images at once not exceed 244: .* 500, .* got 5000", "pcl", NEGATIVES),
        (r"queue_length: from queue_start_epoch 99 on, 0 embeddings .* of 64", "swav", NEVER),
        ("freeze_prototypes_steps: expected less than the 5622", "swav", {"freeze_prototypes_steps": 6 * 937}),
        ("hard_assignment_steps: expected less than the 5622 upd", "swav", {"hard_assignment_steps": 6 * 937}),
        (r"optimiser\.warmup_epochs 6 must be below epochs 6", "simsiam", {"optimiser": SGD(warmup_epochs=6)}),
        (r"accumulate 3 must divide batch_size 64 into equal parts of", "simsiam", {"accumulate": 3}),
    ],
)
def test_sizes_and_first_steps_that_do_not_fit_are_refused(said: str, method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=said):
        sized(method, **options)


def test_a_method_is_not_built_from_sizes_that_nobody_decided() -> None:
    with pytest.raises(ConfigError, match=r"^queue_length, clusters, negatives: .* got 'auto'.*sized"):
        method_class("pcl")(torch.nn.Flatten(), 8, config_class("pcl")())
