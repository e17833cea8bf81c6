"""Models of torchvision and timm, as they come."""

import copy

import pytest
import timm
import torch
from torchvision import models

from deepclust.adaptation import ADAPTERS, T3A, Guard, Tent
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import same, seeded, state

CLASSES = 5


def pictures(seed, count=4):
    return torch.rand(count, 3, 32, 32, generator=seeded(seed))


@pytest.fixture(scope="module")
def resnet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.resnet18(num_classes=CLASSES)
    for seed in range(3):  # as if trained
        model(pictures(seed))
    return model.eval()


@pytest.fixture(scope="module")
def vit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=CLASSES, pretrained=False
        )
        torch.nn.init.normal_(model.head.weight)
    return model.eval()


def traces(model):
    """All of a model that an adapter could leave something in."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (name, module.training, *(len(getattr(module, kind)) for kind in hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    ], [(name, value.requires_grad, value.grad is None) for name, value in model.named_parameters()]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_torchvision_resnet_adapts_in_three_lines_and_is_left_without_a_trace(resnet, name):
    weights, before = state(resnet), copy.deepcopy(traces(resnet))
    adapter = ADAPTERS[name](resnet)
    configured = traces(adapter.model)[0]
    logits = [adapter(pictures(seed)) for seed in (5, 6)]
    assert all(batch.shape == (4, CLASSES) and torch.isfinite(batch).all() for batch in logits)
    assert same(state(resnet), weights)
    assert traces(resnet) == before
    assert traces(adapter.model)[0] == configured, "nor does a batch leave one in the copy"


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "bn"])
def test_a_timm_vision_transformer_adapts_in_three_lines_and_is_left_without_a_trace(vit, name):
    weights, before = state(vit), copy.deepcopy(traces(vit))
    adapter = ADAPTERS[name](vit)
    logits = [adapter(pictures(seed)) for seed in (5, 6)]
    assert all(batch.shape == (4, CLASSES) and torch.isfinite(batch).all() for batch in logits)
    assert same(state(vit), weights)
    assert traces(vit) == before


@pytest.mark.parametrize(("name", "fallbacks"), [("resnet", ["source", "bn"]), ("vit", ["source"])])
def test_a_guarded_model_of_either_library_falls_back_where_tent_goes_astray_and_leaves_no_trace(
    name, fallbacks, request
):
    model = request.getfixturevalue(name)
    weights, before = state(model), copy.deepcopy(traces(model))
    tame = Guard(Tent(model, rate=1e-9), model, tolerance=0.99)
    wild = Guard(Tent(model, rate=10.0, predict="after"), model, tolerance=0.0)
    alone = Tent(model, rate=1e-9)
    for seed in (5, 6):
        images = pictures(seed)
        assert torch.equal(tame(images), alone(images))
        given = wild(images)
        assert wild.verdict.answer in fallbacks
        assert torch.equal(given, ADAPTERS[wild.verdict.answer](model)(images))
    assert same(state(model), weights)
    assert traces(model) == before


def test_tents_first_prediction_of_a_transformer_is_the_models_own(vit):
    images = pictures(0)
    torch.testing.assert_close(Tent(vit)(images), vit(images).detach())


def test_without_batch_norm_bn_says_what_to_do(vit):
    with pytest.raises(AdaptationError, match=r"bn needs BatchNorm layers.*this model has none; use the source"):
        ADAPTERS["bn"](vit)


def test_tent_moves_the_layer_norms_of_a_transformer_and_nothing_else(vit):
    adapter = Tent(vit)
    adapter(pictures(0))
    before = {f"model.{name}": value for name, value in vit.named_parameters()}
    moved = {name for name, value in adapter.model.named_parameters() if not torch.equal(value, before[name])}
    blocks = {f"model.blocks.{block}.norm{which}" for block in (0, 1) for which in (1, 2)}
    assert {name.rpartition(".")[0] for name in moved} == blocks | {"model.norm"}


def test_a_transformers_features_are_what_its_head_is_given(vit):
    adapter = T3A(vit)
    images = pictures(0)
    adapter(images)
    features = vit.forward_head(vit.forward_features(images), pre_logits=True).detach()
    units = adapter.bank.features
    for feature in features / features.norm(dim=1, keepdim=True):
        assert (units - feature).abs().amax(dim=1).min() < 1e-5
