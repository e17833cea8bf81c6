"""Models of torchvision and timm, as they come."""

import copy

import pytest
import timm
import torch
from torchvision import models

from deepclust.adaptation import T3A, Guard
from tests.deepclust.adaptation.nets import make, same, seeded, state

CLASSES = 5


def pictures(seed, count=4):
    return torch.rand(count, 3, 32, 32, generator=seeded(seed))


@pytest.fixture(scope="module")
def libraries():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        resnet = models.resnet18(num_classes=CLASSES)
        torch.manual_seed(0)
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=CLASSES)
        torch.nn.init.normal_(vit.head.weight)
    for seed in range(3):  # as if trained
        resnet(pictures(seed))
    return {"resnet": resnet.eval(), "vit": vit.eval()}


def traces(model):
    """All of a model that an adapter could leave something in."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (name, module.training, *(len(getattr(module, kind)) for kind in hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    ], [(name, value.requires_grad, value.grad is None) for name, value in model.named_parameters()]


@pytest.mark.parametrize(
    ("library", "name"),
    [*(("resnet", name) for name in ("bn", "tent", "t3a", "tsd", "rotta")), ("vit", "tsd"), ("vit", "roid")],
)
def test_a_model_of_a_library_adapts_in_three_lines_and_is_left_without_a_trace(library, name, libraries):
    model = libraries[library]
    weights, before = state(model), copy.deepcopy(traces(model))
    adapter = make(name, model)
    configured = traces(adapter.model)[0]
    logits = [adapter(pictures(seed)) for seed in (5, 6)]
    assert all(batch.shape == (4, CLASSES) and torch.isfinite(batch).all() for batch in logits)
    assert same(state(model), weights)
    assert traces(model) == before
    assert traces(adapter.model)[0] == configured, "nor does a batch leave one in the copy"


@pytest.mark.parametrize(("library", "fallbacks"), [("resnet", ["source", "bn"]), ("vit", ["source"])])
def test_a_guarded_model_of_either_library_falls_back_where_tent_goes_astray_and_leaves_no_trace(
    library, fallbacks, libraries
):
    model = libraries[library]
    weights, before = state(model), copy.deepcopy(traces(model))
    wild = Guard(make("tent", model, rate=10.0, predict="after"), model, tolerance=0.0)
    for images in (pictures(5), pictures(6)):
        given = wild(images)
        assert wild.verdict.answer in fallbacks
        assert torch.equal(given, make(wild.verdict.answer, model)(images))
    assert same(state(model), weights)
    assert traces(model) == before


def test_a_transformers_features_are_what_its_head_is_given(libraries):
    vit, images = libraries["vit"], pictures(0)
    adapter = T3A(vit)
    adapter(images)
    features = vit.forward_head(vit.forward_features(images), pre_logits=True).detach()
    for feature in features / features.norm(dim=1, keepdim=True):
        assert (adapter.bank.features - feature).abs().amax(dim=1).min() < 1e-5
