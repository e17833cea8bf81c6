"""All that outlives a step is in the state dict."""

from __future__ import annotations

import pytest
import torch

from deepclust import seeding
from deepclust.methods import METHODS, Method, method_class
from tests.deepclust.methods.toys import backbone, embedder, normal, update

IMAGES = 40
_MOCO = {
    "hidden_dim": 7, "dim": 6, "key_momentum": 0.9, "queue_length": 20, "temperature": 0.2, "key_groups": 2,
}  # fmt: skip
OPTIONS: dict[str, dict[str, object]] = {
    "swav": {
        "hidden_dim": 7, "dim": 6, "prototypes": [10, 5], "temperature": 0.1, "epsilon": 0.05, "sinkhorn_iterations": 3,
        "assign_crops": [0, 1], "freeze_prototypes_steps": 2, "hard_assignment_steps": 3, "queue_length": 16,
        "queue_start_epoch": 1,
    },
    "deepcluster_v2": {
        "hidden_dim": 7, "dim": 6, "prototypes": [10, 5], "temperature": 0.1, "assign_crops": [0, 1],
        "kmeans_iterations": 5, "kmeans_engine": "faiss", "kmeans_restarts": 2,
    },
    "moco": _MOCO,
    "pcl": _MOCO | {
        "clusters": [20, 30], "negatives": 8, "warmup_epochs": 1, "kmeans_iterations": 5,
        "kmeans_engine": "faiss", "kmeans_restarts": 2, "kmeans_every": 2, "kmeans_warm_start": True, "spherical": True,
    },
    "simsiam": {
        "hidden_dim": 7, "dim": 6, "projector_layers": 3, "predictor_dim": 4, "constant_predictor_rate": True,
        "zero_init_residual": True,
    },
}  # fmt: skip


def build(name: str, seed: int) -> Method:
    with seeding.seeded(seed):
        method = method_class(name)(backbone(norm=True), 8, **OPTIONS[name])
    method.check(IMAGES)
    method.bind(IMAGES)
    return method


def run(method: Method, first: int, last: int, *, start_epoch: bool = True) -> list[float]:
    """Losses of steps first to last, three steps an epoch, each in two parts."""
    images = normal(IMAGES, 1, 4, 4, seed=0)
    losses = []
    for step in range(first, last):
        if step % 3 == 0 and (start_epoch or step > first):
            method.before_epoch(step // 3, embedder(images), step)
        indices = torch.arange(8 * (step % 5), 8 * (step % 5) + 8)
        views = [images[indices] + 0.1 * normal(8, 1, 4, 4, seed=10 * step + n) for n in range(2)]
        parts = [([view.chunk(2)[n] for view in views], indices.chunk(2)[n]) for n in range(2)]
        losses += [float(loss) for loss, _ in update(method, step, parts, rate=0.1, seed=step)]
    return losses


def test_every_method_has_its_options_here() -> None:
    assert OPTIONS.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [1, 4, 6, 7, 11])
def test_a_method_loaded_from_its_state_goes_on_bit_for_bit(name: str, stop: int) -> None:
    straight = build(name, seed=0)
    run(straight, 0, stop)
    again = build(name, seed=1)
    again.load_state_dict(straight.state_dict())
    # In the middle of an epoch nothing but the state can tell where the run was.
    within = stop % 3 != 0
    expected = run(straight, stop, 14, start_epoch=not within)
    assert run(again, stop, 14, start_epoch=not within) == expected
    for name_, tensor in straight.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name_]), name_


@pytest.mark.parametrize("name", METHODS)
def test_logged_scalars_are_finite_have_no_gradient_and_their_common_names(name: str) -> None:
    method = build(name, seed=0)
    run(method, 0, 8)
    images = normal(IMAGES, 1, 4, 4, seed=0)
    method.before_step(8)
    _, logged = method.loss([images[:8], images[8:16]], torch.arange(8), torch.Generator())
    common = {"embedding_spread", "loss_to_chance", "prototypes_used", "code_entropy"}
    own = {
        "swav": common,
        "deepcluster_v2": common - {"code_entropy"},
        "moco": {"embedding_spread", "loss_to_chance", "info_nce"},
        "pcl": {"embedding_spread", "loss_to_chance", "info_nce", "proto_nce"},
        "simsiam": {"embedding_spread"},
    }
    assert logged.keys() == own[name]
    for scalar in logged.values():
        assert scalar.ndim == 0
        assert not scalar.requires_grad
        assert torch.isfinite(scalar)
