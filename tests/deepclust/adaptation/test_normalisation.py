"""BatchNorm's statistics: the batch's, between, aligned."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from deepclust.adaptation import BN, Classifier
from deepclust.adaptation.normalisation import align_statistics, use_batch_statistics
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import LIVELY, classifier, make, same, seeded, state, stream


def trained(norm, seed=0):
    """A BatchNorm with weights and statistics as far from the initial ones as training brings them."""
    generator = seeded(seed)
    for tensor in (norm.weight, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
    for tensor in (norm.bias, norm.running_mean):
        nn.init.normal_(tensor, generator=generator)
    return norm


def convolutional():
    """Two convolutions with BatchNorm, the second of timm's kind that holds its activation; float64."""
    generator = seeded(0)
    first, second, head = nn.Conv2d(1, 4, 2), nn.Conv2d(4, 3, 2), nn.Linear(3, 3)
    for parameter in (*first.parameters(), *second.parameters(), *head.parameters()):
        nn.init.normal_(parameter, generator=generator)
    norms = trained(nn.BatchNorm2d(4), 1), trained(BatchNormAct2d(3, act_layer=nn.ReLU), 2)
    featurizer = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier(featurizer, head).double().eval()


def by_hand(values, norm, weight):
    """Normalise (B, C, H, W) with `weight` on the running statistics."""
    column = (1, -1, 1, 1)
    own = values.mean(dim=(0, 2, 3))
    mean = weight * norm.running_mean + (1 - weight) * own
    spread = ((values - own.view(column)) ** 2).mean(dim=(0, 2, 3))
    scale = norm.weight / torch.sqrt(weight * norm.running_var + (1 - weight) * spread + norm.eps)
    return (values - mean.view(column)) * scale.view(column) + norm.bias.view(column)


def convolutional_by_hand(model, images, weight):
    first, norm, _, second, norm_and_relu, _, _ = model.featurizer
    hidden = by_hand(first(images), norm, weight).clamp(min=0)
    return model.head(by_hand(second(hidden), norm_and_relu, weight).clamp(min=0).mean(dim=(2, 3)))


@pytest.mark.parametrize(("prior", "count"), [(0.0, 9), (3.0, 9), (16.0, 1)])
def test_a_prior_of_n_images_weighs_n_by_n_plus_the_batchs_and_nothing_is_kept(prior, count):
    model = convolutional()
    adapter = make("bn", model, prior=prior)
    for images in stream(3):
        truth = convolutional_by_hand(model, images[:count], prior / (prior + count)).detach()
        torch.testing.assert_close(adapter(images[:count]), truth, rtol=0, atol=1e-10)


def test_a_prior_needs_running_statistics():
    model = classifier()
    use_batch_statistics(model)
    with pytest.raises(AdaptationError, match=r"a prior of 4.0 images weighs .* keeps none in some layers .*prior 0"):
        make("bn", model, prior=4)
    BN(model)(stream(1)[0])


def test_batch_statistics_leave_off_dropout_and_the_random_activation_inside_a_batch_norm():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    use_batch_statistics(model)
    torch.testing.assert_close(model(torch.rand(8, 3, generator=seeded(0))).mean(dim=0), torch.zeros(3))
    norm = trained(BatchNormAct2d(3, drop_layer=nn.Dropout, act_layer=nn.RReLU, inplace=False))
    use_batch_statistics(nn.Sequential(norm))
    batch = torch.randn(8, 3, 2, 2, generator=seeded(0))
    expected = nn.functional.batch_norm(batch, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(norm(batch), nn.functional.leaky_relu(expected, (1 / 8 + 1 / 3) / 2))


@pytest.mark.parametrize("name", ["bn", "tent", "tsd", "rotta"])
def test_batch_norm_that_never_saw_data_is_an_error(name):
    model = classifier(LIVELY)
    model.featurizer[2].reset_running_stats()
    with pytest.raises(AdaptationError, match="still at their initial values: the model was never trained"):
        make(name, model)
    make("t3a", model)(stream(1)[0])
    model.featurizer[2].running_var[0] = 2
    make(name, model)


@pytest.mark.parametrize(("model", "sizes"), [(classifier, [40]), (convolutional, [7, 30, 3])])
def test_aligning_leaves_the_function_as_it_was_and_makes_batch_statistics_of_the_source_agree(model, sizes):
    model = model()
    source = torch.randn((40, 1, 3, 4), generator=seeded(5), dtype=torch.float64) * 1.7 - 0.4
    unseen = stream(1)[0]
    known, other = model(source).detach(), model(unseen).detach()
    assert not torch.allclose(BN(model)(source), known), "the statistics have to differ at first"
    align_statistics(model, source.split(sizes))
    for got, truth in ((model(source), known), (model(unseen), other), (BN(model)(source), known)):
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-8)


def broken():
    yield stream(1)[0]
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("batches", "weight", "message"),
    [
        ([], 1.0, "expected images of the source .* got none"),
        (broken(), 1.0, "the disk is gone"),
        ([*stream(1), stream(1)[0] * torch.nan], 1.0, "expected finite images, got NaN"),
        (stream(2), torch.inf, "BatchNorm is given NaN or infinity"),
    ],
)
def test_aligning_that_fails_leaves_the_model_as_it_was(batches, weight, message):
    model = convolutional()
    model.featurizer[1].train()
    model.featurizer[0].weight.data[0, 0, 0, 0] = weight
    modes, before = [module.training for module in model.modules()], state(model)
    with pytest.raises((AdaptationError, OSError), match=message):
        align_statistics(model, batches)
    assert same(state(model), before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
