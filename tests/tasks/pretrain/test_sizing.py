"""What is left at `auto` is decided by the data, what is stated is kept, and sizes that do not fit are refused."""

from __future__ import annotations

from typing import Any

import pytest

from deepclust.errors import ConfigError
from deepclust.methods.parts import sizes
from tasks.pretrain import sizing
from tasks.shared.operations import params
from tasks.shared.operations.params.pretrain import Trained
from tests.paths import ROOT


def _section(method: str, **changes: Any) -> Trained:
    raw = params.read(ROOT / "params.yaml")
    raw["pretrain"][method] |= changes
    section = params.parse(raw).pretrain.encoders[method]
    assert isinstance(section, Trained)
    return section


def test_automatic_sizes_are_those_of_the_rule() -> None:
    swav = _section("swav", prototypes="auto", queue_length="auto", batch_size=64)
    options = sizing.options(swav, images=60_000, image_size=28)
    assert options["prototypes"] == (100,)
    assert options["queue_length"] == 64
    pcl = _section("pcl", clusters="auto", negatives="auto", queue_length="auto", batch_size=256)
    options = sizing.options(pcl, images=60_000, image_size=28)
    assert (options["clusters"], options["negatives"], options["queue_length"]) == ((500, 1000, 2000), 244, 4096)


def test_only_what_the_data_decided_is_reported() -> None:
    section = _section("swav", prototypes="auto", queue_length=512)
    options = sizing.options(section, images=60_000, image_size=28)
    assert sizing.automatic(section, options) == {"prototypes": (100,)}


def test_deepcluster_v2_has_three_heads_of_its_own_accord() -> None:
    options = sizing.options(_section("deepcluster_v2", prototypes="auto"), images=60_000, image_size=28)
    assert options["prototypes"] == (100, 100, 100)


@pytest.mark.parametrize(("stated", "expected"), [(30, (30,)), ([20, 40], (20, 40))])
def test_stated_prototypes_are_kept(stated: Any, expected: tuple[int, ...]) -> None:
    assert sizing.options(_section("swav", prototypes=stated), images=999, image_size=28)["prototypes"] == expected


def test_parts_of_a_batch_count_for_the_negatives_not_the_whole() -> None:
    section = _section("pcl", clusters=[300], negatives="auto", batch_size=256, accumulate=4)
    assert sizing.options(section, images=60_000, image_size=28)["negatives"] == 300 - 64


def test_automatic_clusters_with_too_many_stated_negatives_are_refused_with_the_numbers() -> None:
    section = _section("pcl", clusters="auto", negatives=5000, batch_size=256)
    with pytest.raises(ConfigError, match=r"with batch_size 256 not exceed .* 500, .* got 5000"):
        sizing.options(section, images=60_000, image_size=28)


def test_a_batch_too_large_for_the_data_is_refused_with_the_one_that_fits() -> None:
    with pytest.raises(ConfigError, match="lower batch_size to at most 100"):
        sizing.options(_section("pcl", clusters="auto", batch_size=256), images=300, image_size=28)
    assert sizes.clusters(300, 100)


def test_a_queue_that_would_never_be_used_is_refused_if_stated_and_left_out_if_automatic() -> None:
    late = {"batch_size": 64, "prototypes": 100, "queue_start_epoch": 99}
    assert (
        sizing.options(_section("swav", queue_length="auto", **late), images=60_000, image_size=28)["queue_length"] == 0
    )
    with pytest.raises(ConfigError, match=r"queue_length: from queue_start_epoch 99 on, 0 embeddings .* of 64"):
        sizing.options(_section("swav", queue_length=64, **late), images=60_000, image_size=28)


@pytest.mark.parametrize("name", ["freeze_prototypes_steps", "hard_assignment_steps"])
def test_first_steps_that_are_the_whole_run_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected less than the 1404 updates"):
        sizing.options(_section("swav", **{name: 1404}), images=60_000, image_size=28)
    sizing.options(_section("swav", **{name: 1403}), images=60_000, image_size=28)
