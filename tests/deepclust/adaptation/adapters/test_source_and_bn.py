"""Source and BN against batch normalisation written out by hand."""

import pytest
import torch
from torch import nn

from deepclust.adaptation import BN, Classifier, Source
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation import naive
from tests.deepclust.adaptation.nets import classifier, same, state, stream


@pytest.mark.parametrize("method", [Source, BN])
def test_predictions_are_those_of_the_formula_on_every_batch_and_nothing_is_kept(method):
    model = classifier()
    adapter, p = method(model), naive.values(model)
    before = state(adapter.model)
    for images in stream(6):
        hidden = naive.inside(p, images)
        statistics = naive.moments(hidden) if method is BN else naive.running(model)
        torch.testing.assert_close(adapter(images), naive.logits(p, hidden, *statistics), rtol=0, atol=1e-12)
    assert same(state(adapter.model), before)


def test_source_takes_single_images_and_models_without_batch_norm_and_bn_refuses_them():
    images = stream(1)[0]
    model = Classifier(nn.Flatten(), nn.Linear(12, 3)).double()
    torch.testing.assert_close(Source(model)(images[:1]), model(images)[:1].detach())
    with pytest.raises(AdaptationError, match=r"bn needs BatchNorm layers.*use the source adapter"):
        BN(model)
