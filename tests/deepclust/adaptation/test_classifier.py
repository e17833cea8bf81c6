"""Models as classifiers: which are taken, and what those that are not are told."""

import re

import pytest
import torch
from torch import nn

from deepclust.adaptation import ADAPTERS, Classifier, Source, Tent, WholeModel
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import LIVELY, PIXELS, classifier, make, same, stream


class Chain(nn.Module):
    """The classifier of `nets`, as a model that knows nothing of ours; then one more layer."""

    def __init__(self, last=None):
        super().__init__()
        source = classifier(LIVELY)
        self.body, self.fc, self.last = source.featurizer, source.head, last or nn.Identity()

    def forward(self, images):
        return self.last(self.fc(self.body(images)))


class Keyword(Chain):
    def forward(self, images):
        return self.fc(input=self.body(images))


def auxiliary():
    """The chain with a linear layer after the head, that no prediction needs."""
    model = Chain()
    model.auxiliary = nn.Linear(5, 3).double()
    return model


@pytest.mark.parametrize("model", [Chain, Keyword])
def test_a_whole_model_gives_what_its_head_is_given_and_returns_and_adapts_as_the_same_model_taken_apart(model):
    images = stream(1)[0]
    ours, whole = classifier(LIVELY), WholeModel(model().eval())
    assert same(whole.outputs(images), ours.outputs(images))
    assert torch.equal(whole(images), ours(images))
    assert not whole.model.fc._forward_hooks, "no hook stays behind"
    for name in ("tent", "tsd"):
        adapter, apart = make(name, model()), make(name, ours)
        assert all(torch.equal(adapter(images), apart(images)) for images in stream(4))


def test_the_head_is_the_last_linear_layer_or_the_one_that_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3), nn.Linear(3, 2))
    assert WholeModel(model).head is model[2]
    assert WholeModel(model, head="1").head is model[1]
    for wrong, head, has in ((Chain(), "head", ".*, fc$"), (Chain(), "body", ".*"), (nn.Flatten(), "fc", "none")):
        with pytest.raises(AdaptationError, match=rf"name a linear layer of the model, got '{head}'; it has {has}"):
            WholeModel(wrong, head=head)


def test_a_model_whose_output_is_not_its_heads_is_an_error_where_features_are_needed():
    model = WholeModel(Chain(nn.LogSoftmax(dim=1)), head="fc")
    adapter = make("t3a", model)
    with pytest.raises(AdaptationError, match=r"return what its linear head 'fc' returns; name the right layer"):
        adapter(stream(1)[0])
    assert not any(module._forward_hooks for module in adapter.model.modules())
    assert Tent(model)(stream(1)[0]).shape == (9, 4), "others need the output alone"


def test_each_adapter_that_is_named_as_the_remedy_works_without_a_linear_head():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    for batch in stream(2):
        model(batch)
    with pytest.raises(AdaptationError, match=r"linear head \(nn.Linear\).*use an adapter that needs none") as caught:
        make("t3a", model)
    named = {name for name in ADAPTERS if re.search(rf"\b{name}\b", str(caught.value))}
    assert named == ADAPTERS.keys() - {"t3a", "tsd", "lame"}
    for name in named:
        for parameters in ("affine", "all"):
            options = {"parameters": parameters} if name not in ("source", "bn") else {}
            assert make(name, model, **options)(stream(1)[0]).shape == (9, 3)
    for name, options in (("tsd", {}), ("lame", {}), ("tent", {"parameters": "body"})):
        with pytest.raises(AdaptationError, match="expected a classifier with a linear head"):
            make(name, model, **options)


@pytest.mark.parametrize(("name", "parameters"), [("tent", "body"), ("tent", "head"), ("rotta", "body")])
def test_a_head_that_is_guessed_wrongly_is_an_error_where_body_or_head_learn(name, parameters):
    batches = stream(2)
    with pytest.raises(AdaptationError, match=r"its linear head 'auxiliary' returns; name the right layer"):
        make(name, auxiliary(), parameters=parameters)(batches[0])
    right = make(name, WholeModel(auxiliary(), head="fc"), parameters=parameters)
    truth = make(name, classifier(LIVELY), parameters=parameters)
    assert all(torch.equal(right(images), truth(images)) for images in batches)
    assert make(name, auxiliary(), parameters="affine")(batches[0]).shape == (9, 4), "no head is needed"


class Detached(nn.Module):
    def forward(self, logits):
        return logits.detach()


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        (Tent, lambda: Chain(Detached()), "tent: no gradient reaches the chosen parameters"),
        (Tent, lambda: Chain(nn.Flatten(0)), r"a model that returns logits \(9, classes\), got \(36,\)"),
        (Source, lambda: Chain(nn.Linear(4, 1).double()), r"a model that returns logits \(9, classes\), got \(9, 1\)"),
        (Source, lambda: Classifier(nn.Flatten(), nn.Sequential()), "a head of type nn.Linear, got Sequential"),
        (Source, lambda: Classifier(nn.Flatten(), nn.Linear(12, 1)), "at least two classes, got 1"),
        (Source, lambda: Classifier(nn.Flatten(), nn.Linear(7, 3)).double(), r"features \(9, 7\), got \(9, 12\)"),
    ],
)
def test_a_model_that_can_not_be_adapted_or_is_no_classifier_is_an_error(method, model, message):
    with pytest.raises(AdaptationError, match=message):
        method(model())(stream(1)[0])
