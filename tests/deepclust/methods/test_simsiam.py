"""SimSiam against the formula in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.methods.simsiam import SimSiam, symmetric_loss
from deepclust.models import backbones
from tests.deepclust.methods.toys import backbone, build, normal


def toy(seed: int = 0, body: nn.Module | None = None, **changes: object) -> SimSiam:
    torch.manual_seed(seed)
    options = {"hidden_dim": 12, "dim": 10, "projector_layers": 2, "zero_init_residual": False}
    method: SimSiam = build("simsiam", body or backbone(), 8, **(options | changes))
    return method


def cosine(left: Tensor, right: Tensor) -> float:
    return float(F.cosine_similarity(left, right).mean())


@pytest.mark.reference
@pytest.mark.parametrize("layers", [2, 3])
def test_the_whole_method_is_its_layers_by_hand_in_float64(seed: int, layers: int) -> None:
    """Batch normalisation after every layer but the predictor's last; ReLU after all but the last of either."""
    method = toy(seed, projector_layers=layers)
    views = list(normal(2, 32, 1, 4, 4, seed=seed))
    loss, logged = method.loss(views, torch.arange(32), torch.Generator())

    def layer(x: Tensor, linear: nn.Module, *, norm: bool, relu: bool) -> Tensor:
        x = copy.deepcopy(linear).double()(x).detach()
        if norm:
            x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        return x.relu() if relu else x

    linears = [module for module in method.projector if isinstance(module, nn.Linear)]
    assert [tuple(linear.weight.shape) for linear in linears] == [(12, 8), *[(12, 12)] * (layers - 2), (10, 12)]
    assert not method.projector[-1].affine
    z, p = [], []
    hidden, last = method.predictor[0], method.predictor[3]
    for view in views:
        x = copy.deepcopy(method.backbone).double()(view.double()).detach()
        for number, linear in enumerate(linears):
            x = layer(x, linear, norm=True, relu=number < layers - 1)
        z.append(x)
        p.append(layer(layer(x, hidden, norm=True, relu=True), last, norm=False, relu=False))
    assert float(loss.detach()) == pytest.approx(-(cosine(p[0], z[1]) + cosine(p[1], z[0])) / 2, rel=1e-4, abs=1e-5)
    assert logged.keys() == {"embedding_spread"}


def test_the_targets_get_no_gradient_and_the_predictions_do() -> None:
    given = [torch.randn(4, 5, requires_grad=True) for _ in range(4)]
    symmetric_loss(*given).backward()  # type: ignore[no-untyped-call]
    assert [tensor.grad is not None for tensor in given] == [True, True, False, False]


def test_only_the_predictor_may_keep_its_rate() -> None:
    first, second = toy().parameter_groups()
    assert (first.get("constant_rate", False), second["constant_rate"]) == (False, True)
    assert not toy(constant_predictor_rate=False).parameter_groups()[1]["constant_rate"]
    assert len(first["params"]) + len(second["params"]) == len(list(toy().parameters()))


@pytest.mark.parametrize("zero", [False, True])
def test_residual_blocks_start_as_the_identity_only_if_asked(zero: bool) -> None:
    body, _ = backbones.build("small", channels=1, image_size=16)
    toy(body=body, zero_init_residual=zero)
    blocks = [module for module in body.modules() if isinstance(module, backbones.ResidualBlock)]
    assert [not block.norm2.weight.any() for block in blocks] == [zero] * 3
    assert all(parameter.any() for parameter in toy(zero_init_residual=zero).backbone.parameters())  # has no blocks
