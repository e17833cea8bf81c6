"""The contract that every adapter keeps."""

import copy

import pytest
import torch
from torch import nn

from deepclust.adaptation import ADAPTERS
from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.normalisation import has_batch_norm, use_batch_statistics
from deepclust.adaptation.parameters import select_parameters
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import classifier, same, state, stream


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_model_given_never_changes(name):
    model = classifier()
    before, modes = state(model), [module.training for module in model.modules()]
    wants = [parameter.requires_grad for parameter in model.parameters()]
    adapter = ADAPTERS[name](model)
    for images in stream():
        adapter(images)
    adapter.reset()
    assert same(state(model), before)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ADAPTERS)
def test_images_are_not_modified_and_logits_carry_no_gradient(name):
    adapter = ADAPTERS[name](classifier())
    for images in stream(3):
        before = images.clone()
        logits = adapter(images)
        assert torch.equal(images, before)
        assert not logits.requires_grad
        assert logits.shape == (len(images), 4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_reset_restores_everything_bit_for_bit(name):
    adapter = ADAPTERS[name](classifier())
    fresh = state(adapter.model)
    first = [adapter(images) for images in stream()]
    adapter.reset()
    assert same(state(adapter.model), fresh)
    second = [adapter(images) for images in stream()]
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_model_trained_on_after_the_adapter_was_made_is_not_followed(name):
    model = classifier()
    images = stream(1)[0]
    truth = ADAPTERS[name](model)(images)
    adapter = ADAPTERS[name](model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    adapter.reset()
    assert torch.equal(adapter(images), truth)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_work_where_gradients_are_switched_off(name):
    images = stream(2)
    truth = ADAPTERS[name](classifier())
    with torch.no_grad():
        adapter = ADAPTERS[name](classifier())
        results = [adapter(batch) for batch in images]
    assert all(torch.equal(result, truth(batch)) for result, batch in zip(results, images, strict=True))


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: images.masked_fill(images > 1, torch.nan), "got NaN or infinity"),
        (lambda images: images / 0, "got NaN or infinity"),
        (lambda images: images.long(), "expected images as floats, got torch.int64"),
        (lambda images: images[:0], r"got shape \(0, 1, 3, 4\)"),
    ],
)
def test_a_bad_batch_is_an_error_and_leaves_the_adapter_as_it_was(name, spoil, message):
    adapter, untouched = ADAPTERS[name](classifier()), ADAPTERS[name](classifier())
    first, second, third = stream(3)
    adapter(first), untouched(first)
    with pytest.raises(AdaptationError, match=message):
        adapter(spoil(second))
    assert same(state(adapter.model), state(untouched.model))
    assert torch.equal(adapter(third), untouched(third))


@pytest.mark.parametrize("name", ["bn", "tsd"])
def test_a_batch_of_one_is_an_error_where_batch_statistics_are_used(name):
    adapter = ADAPTERS[name](classifier())
    with pytest.raises(AdaptationError, match=r"at least two images a batch.*collect a larger batch"):
        adapter(stream(1)[0][:1])


def test_a_classifier_needs_a_linear_head_with_two_classes_and_fitting_features():
    with pytest.raises(AdaptationError, match=r"expected a head of type nn.Linear, got Sequential"):
        Classifier(nn.Flatten(), nn.Sequential(nn.Linear(12, 3)))
    with pytest.raises(AdaptationError, match="at least two classes, got 1"):
        Classifier(nn.Flatten(), nn.Linear(12, 1))
    with pytest.raises(AdaptationError, match=r"expected features \(9, 7\), got \(9, 12\)"):
        ADAPTERS["source"](Classifier(nn.Flatten(), nn.Linear(7, 3)).double())(stream(1)[0])


def test_parameters_are_selected_by_role():
    featurizer = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3))
    model = Classifier(featurizer, nn.Linear(3, 2))
    body = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias"]
    names = {which: list(select_parameters(model, which)) for which in ("all", "affine", "body", "head")}
    assert names["body"] == [f"featurizer.{name}" for name in body]
    assert names["head"] == ["head.weight", "head.bias"]
    assert names["all"] == names["body"] + names["head"]
    assert names["affine"] == [f"featurizer.{name}" for name in ("1.weight", "1.bias", "4.weight", "4.bias")]
    assert select_parameters(model, "affine")["featurizer.4.bias"] is featurizer[4].bias


def test_parameters_that_do_not_exist_are_an_error():
    plain = Classifier(nn.Flatten(), nn.Linear(12, 3))
    for which in ("affine", "body"):
        with pytest.raises(AdaptationError, match=f"parameters '{which}': this model has none"):
            select_parameters(plain, which)
    with pytest.raises(AdaptationError, match="one of all, affine, body, head; got 'norm'"):
        select_parameters(plain, "norm")


@pytest.mark.parametrize("name", ["bn", "tsd"])
def test_batch_norm_that_never_saw_data_is_an_error(name):
    model = classifier()
    model.featurizer[2].reset_running_stats()
    with pytest.raises(AdaptationError, match="still at their initial values: the model was never trained"):
        ADAPTERS[name](model)
    ADAPTERS["source"](model)(stream(1)[0])
    model.featurizer[2].running_var[0] = 2
    ADAPTERS[name](model)


def test_batch_statistics_leave_dropout_off():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    assert has_batch_norm(model)
    use_batch_statistics(model)
    batch = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(batch), model(batch))
    torch.testing.assert_close(model(batch).mean(dim=0), torch.zeros(3))


def test_a_torchvision_resnet_adapts_in_three_lines():
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.resnet18(num_classes=5)
        net(torch.rand(4, 3, 32, 32))  # as if trained
        net.eval()
        head, net.fc = copy.deepcopy(net.fc), nn.Identity()
        adapter = ADAPTERS["tsd"](Classifier(net, head))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert adapter(images).shape == (4, 5)
