"""SimSiam against the formula in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from deepclust.errors import ConfigError
from deepclust.methods.simsiam import Config, SimSiam, symmetric_loss
from deepclust.models import backbones
from tests.deepclust.methods.toys import Array, backbone, normal


def toy(seed: int = 0, body: nn.Module | None = None, **changes: object) -> SimSiam:
    torch.manual_seed(seed)
    options = {
        "hidden_dim": 12,
        "dim": 10,
        "projector_layers": 2,
        "predictor_dim": 4,
    }
    return SimSiam(body or backbone(), 8, Config(**(options | changes)))  # type: ignore[arg-type]


def cosines(left: Array, right: Array) -> float:
    return float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(left, right, strict=True)]))


@pytest.mark.reference
def test_the_loss_is_the_papers_in_float64(seed: int) -> None:
    p1, p2, z1, z2 = np.random.default_rng(seed).normal(size=(4, 9, 5))
    found = symmetric_loss(*(torch.from_numpy(x).float() for x in (p1, p2, z1, z2)))
    assert float(found) == pytest.approx(-(cosines(p1, z2) + cosines(p2, z1)) / 2, rel=1e-5, abs=1e-6)


@pytest.mark.reference
@pytest.mark.parametrize("layers", [2, 3])
def test_the_whole_method_is_its_layers_by_hand_in_float64(seed: int, layers: int) -> None:
    """Batch normalisation after every layer but the predictor's last; ReLU after all but the last of either."""
    method = toy(seed, projector_layers=layers)
    views = list(normal(2, 32, 1, 4, 4, seed=seed))
    loss, logged = method.loss(views, torch.arange(32), torch.Generator())

    def layer(x: Array, linear: nn.Module, *, norm: bool, relu: bool) -> Array:
        x = x @ linear.weight.detach().double().numpy().T  # type: ignore[operator,union-attr]
        if linear.bias is not None:
            x = x + linear.bias.detach().double().numpy()  # type: ignore[operator,union-attr]
        if norm:
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        return np.maximum(x, 0) if relu else x

    linears = [module for module in method.projector if isinstance(module, nn.Linear)]
    assert [(linear.in_features, linear.out_features) for linear in linears] == [
        (8, 12), *[(12, 12)] * (layers - 2), (12, 10)
    ]  # fmt: skip
    z, p = [], []
    for view in views:
        x = copy.deepcopy(method.backbone).double()(view.double()).detach().numpy()
        for number, linear in enumerate(linears):
            x = layer(x, linear, norm=True, relu=number < layers - 1)
        z.append(x)
        p.append(
            layer(layer(x, method.predictor[0], norm=True, relu=True), method.predictor[3], norm=False, relu=False)
        )
    assert float(loss.detach()) == pytest.approx(-(cosines(p[0], z[1]) + cosines(p[1], z[0])) / 2, rel=1e-4, abs=1e-5)
    spread = (z[0] / np.linalg.norm(z[0], axis=1, keepdims=True)).std(0).mean() * 10**0.5
    assert float(logged["embedding_spread"]) == pytest.approx(spread, rel=1e-4)


def test_the_targets_get_no_gradient_and_the_predictions_do() -> None:
    p1, p2, z1, z2 = (torch.randn(4, 5, requires_grad=True) for _ in range(4))
    symmetric_loss(p1, p2, z1, z2).backward()  # type: ignore[no-untyped-call]
    assert z1.grad is None
    assert z2.grad is None
    assert p1.grad is not None
    assert p2.grad is not None


def test_swapping_the_views_changes_nothing() -> None:
    left, right = normal(2, 16, 1, 4, 4, seed=0)
    first, _ = toy().loss([left, right], torch.arange(16), torch.Generator())
    second, _ = toy().loss([right, left], torch.arange(16), torch.Generator())
    assert float(first.detach()) == pytest.approx(float(second.detach()), rel=1e-6)


def test_the_logged_spread_tells_a_healthy_batch_from_a_collapsed_one() -> None:
    views = list(normal(2, 512, 1, 4, 4, seed=0))
    _, healthy = toy().loss(views, torch.arange(512), torch.Generator())
    assert float(healthy["embedding_spread"]) == pytest.approx(1, rel=0.1)
    same = [view[:1].expand(512, -1, -1, -1) for view in views]
    _, collapsed = toy().loss(same, torch.arange(512), torch.Generator())
    assert float(collapsed["embedding_spread"]) < 1e-2


def test_only_the_predictor_may_keep_its_rate() -> None:
    first, second = toy().parameter_groups()
    assert not first.get("constant_rate", False)
    assert second["constant_rate"]
    assert not toy(constant_predictor_rate=False).parameter_groups()[1]["constant_rate"]
    assert len(first["params"]) + len(second["params"]) == len(list(toy().parameters()))


def test_the_last_norm_of_the_projector_has_no_affine_parameters() -> None:
    for layers in (2, 3):
        last = toy(projector_layers=layers).projector[-1]
        assert isinstance(last, nn.BatchNorm1d)
        assert not last.affine


@pytest.mark.parametrize("zero", [False, True])
def test_residual_blocks_start_as_the_identity_only_if_asked(zero: bool) -> None:
    torch.manual_seed(0)
    body, _ = backbones.build("small", channels=1, image_size=16)
    method = toy(body=body, zero_init_residual=zero)
    blocks = [module for module in method.backbone.modules() if isinstance(module, backbones.ResidualBlock)]
    assert [not block.norm2.weight.any() for block in blocks] == [zero] * 3


def test_a_backbone_without_residual_blocks_has_nothing_to_zero() -> None:
    assert all(parameter.any() for parameter in toy(zero_init_residual=True).backbone.parameters())


@pytest.mark.parametrize("layers", [1, 4])
def test_other_depths_are_refused(layers: int) -> None:
    with pytest.raises(ConfigError, match=f"expected 2 or 3, got {layers}"):
        toy(projector_layers=layers)
