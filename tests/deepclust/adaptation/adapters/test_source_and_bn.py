"""Source and BN against batch normalisation written out by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from deepclust.adaptation.adapters.bn import BN
from deepclust.adaptation.adapters.source import Source
from deepclust.adaptation.classifier import Classifier
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import classifier, same, state, stream


def reference(model, images, *, batch_statistics):
    """The classifier in numpy, a loop over the hidden units for the normalisation."""
    linear, norm, last = model.featurizer[1], model.featurizer[2], model.featurizer[4]
    array = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    hidden = images.flatten(1).numpy() @ linear.weight.detach().numpy().T + array["featurizer.1.bias"]
    for unit in range(hidden.shape[1]):
        values = hidden[:, unit]
        mean = sum(values) / len(values) if batch_statistics else array["featurizer.2.running_mean"][unit]
        variance = (
            sum((value - mean) ** 2 for value in values) / len(values)
            if batch_statistics
            else array["featurizer.2.running_var"][unit]
        )
        scale, shift = array["featurizer.2.weight"][unit], array["featurizer.2.bias"][unit]
        hidden[:, unit] = (values - mean) / np.sqrt(variance + norm.eps) * scale + shift
    features = np.maximum(hidden, 0) @ last.weight.detach().numpy().T + array["featurizer.4.bias"]
    return features @ array["head.weight"].T + array["head.bias"]


@pytest.mark.parametrize(("adapter", "batch_statistics"), [(Source, False), (BN, True)])
def test_predictions_are_those_of_the_reference_on_every_batch(adapter, batch_statistics):
    model = classifier()
    adapt = adapter(model)
    before = state(adapt.model)
    for images in stream(6):
        truth = reference(model, images, batch_statistics=batch_statistics)
        np.testing.assert_allclose(adapt(images).numpy(), truth, atol=1e-12)
    assert same(state(adapt.model), before)


def test_bn_is_source_on_a_batch_with_the_statistics_of_the_training_data():
    model = classifier()
    images = stream(1, batch_size=40)[0]
    hidden = model.featurizer[1](images.flatten(1)).detach()
    model.featurizer[2].running_mean.copy_(hidden.mean(dim=0))
    model.featurizer[2].running_var.copy_(hidden.var(dim=0, unbiased=False))
    torch.testing.assert_close(BN(model)(images), Source(model)(images))


def test_bn_undoes_a_change_of_scale_and_offset_of_the_inputs():
    model = classifier()
    model.featurizer[2].eps = 1e-12
    images = stream(1)[0]
    torch.testing.assert_close(BN(model)(3 * images + 0.5), BN(model)(images))
    assert not torch.allclose(Source(model)(3 * images + 0.5), Source(model)(images))


def test_bn_does_not_depend_on_the_batches_before():
    first, second = stream(2)
    adapter = BN(classifier())
    adapter(first)
    assert torch.equal(adapter(second), BN(classifier())(second))


def test_source_takes_single_images_and_models_without_batch_norm():
    images = stream(1)[0]
    model = Classifier(nn.Flatten(), nn.Linear(12, 3)).double()
    torch.testing.assert_close(Source(model)(images[:1]), model(images)[:1].detach())


def test_bn_needs_batch_norm():
    with pytest.raises(AdaptationError, match=r"bn needs BatchNorm layers.*use the source adapter"):
        BN(Classifier(nn.Flatten(), nn.Linear(12, 3)))
