"""Models as classifiers: which are taken, and what those that are not are told."""

import re

import pytest
import torch
from torch import nn

from deepclust.adaptation import ADAPTERS
from deepclust.adaptation.classifier import Classifier, WholeModel, as_classifier
from deepclust.errors import AdaptationError
from tests.deepclust.adaptation.nets import LIVELY, PIXELS, classifier, stream


class Chain(nn.Module):
    """The classifier of `nets`, as a model that knows nothing of ours; then one more layer."""

    def __init__(self, last=None):
        super().__init__()
        source = classifier(LIVELY)
        self.body, self.fc, self.last = source.featurizer, source.head, last or nn.Identity()

    def forward(self, images):
        return self.last(self.fc(self.body(images)))


def test_a_whole_model_gives_what_its_head_is_given_and_returns():
    images = stream(1)[0]
    ours, whole = classifier(LIVELY), WholeModel(Chain().eval())
    for expected, got in zip(ours.outputs(images), whole.outputs(images), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(whole(images), ours(images))
    assert whole.head is whole.model.fc
    assert not whole.model.fc._forward_hooks, "no hook stays behind"


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_whole_model_adapts_as_the_same_model_taken_apart(name):
    whole, apart = ADAPTERS[name](Chain()), ADAPTERS[name](classifier(LIVELY))
    for images in stream(4):
        assert torch.equal(whole(images), apart(images))


def test_the_head_is_the_last_linear_layer_or_the_one_that_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3), nn.Linear(3, 2))
    assert WholeModel(model).head is model[2]
    assert WholeModel(model, head="1").head is model[1]
    ours = classifier()
    assert as_classifier(ours) is ours


def test_a_head_of_a_wrong_name_is_an_error_that_names_the_linear_layers():
    with pytest.raises(AdaptationError, match=r"head to name a linear layer of the model, got 'head'; it has .*, fc$"):
        WholeModel(Chain(), head="head")
    with pytest.raises(AdaptationError, match=r"got 'body'; it has"):
        WholeModel(Chain(), head="body")
    with pytest.raises(AdaptationError, match=r"got 'fc'; it has none"):
        WholeModel(nn.Flatten(), head="fc")


@pytest.mark.parametrize("name", ["t3a", "tsd"])
@pytest.mark.parametrize("last", [nn.LogSoftmax(dim=1), nn.Linear(4, 4).double()])
def test_a_model_whose_output_is_not_its_heads_is_an_error_where_features_are_needed(name, last):
    model = WholeModel(Chain(last), head="fc")
    adapter = ADAPTERS[name](model)
    with pytest.raises(AdaptationError, match=r"return what its linear head 'fc' returns; name the right layer"):
        adapter(stream(1)[0])
    assert not any(module._forward_hooks for module in adapter.model.modules())
    assert ADAPTERS["tent"](model)(stream(1)[0]).shape == (9, 4), "others need the output alone"


@pytest.mark.parametrize("name", ["t3a", "tsd"])
def test_a_model_without_a_linear_layer_is_an_error_where_a_head_is_needed(name):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(AdaptationError, match=r"linear head \(nn.Linear\).*use an adapter that needs none \(source"):
        ADAPTERS[name](model)


def test_each_adapter_that_is_named_as_the_remedy_works_without_a_linear_head():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    for batch in stream(2):
        model(batch)
    with pytest.raises(AdaptationError) as caught:
        ADAPTERS["t3a"](model)
    named = {name for name in ADAPTERS if re.search(rf"\b{name}\b", str(caught.value))}
    assert named == ADAPTERS.keys() - {"t3a", "tsd", "lame"}
    for name in named:
        for parameters in ("affine", "all"):
            options = {"parameters": parameters} if name not in ("source", "bn") else {}
            assert ADAPTERS[name](model, **options)(stream(1)[0]).shape == (9, 3)
    for name in ADAPTERS.keys() - named:
        with pytest.raises(AdaptationError, match="expected a classifier with a linear head"):
            ADAPTERS[name](model)


class Auxiliary(Chain):
    """With a linear layer after the head, that no prediction needs."""

    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(5, 3).double()


@pytest.mark.parametrize("parameters", ["body", "head"])
@pytest.mark.parametrize("name", ["tent", "pseudo_label", "shot_im", "rotta", "roid"])
def test_a_head_that_is_guessed_wrongly_is_an_error_where_body_or_head_learn(name, parameters):
    batches = stream(2)
    adapter = ADAPTERS[name](Auxiliary(), parameters=parameters)
    with pytest.raises(AdaptationError, match=r"its linear head 'auxiliary' returns; name the right layer"):
        adapter(batches[0])
    right = ADAPTERS[name](WholeModel(Auxiliary(), head="fc"), parameters=parameters)
    truth = ADAPTERS[name](classifier(LIVELY), parameters=parameters)
    assert all(torch.equal(right(images), truth(images)) for images in batches)
    assert ADAPTERS[name](Auxiliary(), parameters="affine")(batches[0]).shape == (9, 4), "no head is needed"


def test_a_head_that_is_called_with_a_keyword_is_the_same_head():
    class Keyword(Chain):
        def forward(self, images):
            return self.fc(input=self.body(images))

    images = stream(1)[0]
    for expected, got in zip(WholeModel(Chain()).outputs(images), WholeModel(Keyword()).outputs(images), strict=True):
        assert torch.equal(got, expected)


def test_a_model_through_which_no_gradient_comes_is_an_error():
    class Detached(Chain):
        def forward(self, images):
            return super().forward(images).detach()

    adapter = ADAPTERS["tent"](Detached())
    with pytest.raises(AdaptationError, match="tent: no gradient reaches the chosen parameters"):
        adapter(stream(1)[0])


@pytest.mark.parametrize("parameters", ["body", "head"])
def test_body_and_head_need_a_head_to_tell_them_apart(parameters):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    with pytest.raises(AdaptationError, match="expected a classifier with a linear head"):
        ADAPTERS["tent"](model, parameters=parameters)
    for taken in ("affine", "all"):
        assert ADAPTERS["tent"](model, parameters=taken)(stream(1)[0]).shape == (9, 3)


@pytest.mark.parametrize("name", ["source", "bn", "tent"])
@pytest.mark.parametrize(
    ("last", "got"),
    [
        (nn.Flatten(0), r"\(36,\)"),
        (nn.Unflatten(1, (2, 2)), r"\(9, 2, 2\)"),
        (nn.Linear(4, 1).double(), r"\(9, 1\)"),
    ],
)
def test_logits_of_a_wrong_shape_are_an_error(name, last, got):
    adapter = ADAPTERS[name](Chain(last))
    with pytest.raises(AdaptationError, match=rf"a model that returns logits \(9, classes\), got {got}"):
        adapter(stream(1)[0])


def test_a_model_that_returns_more_than_logits_is_an_error():
    class Two(Chain):
        def forward(self, images):
            return super().forward(images), images

    with pytest.raises(AdaptationError, match=r"returns logits \(9, classes\), got tuple"):
        ADAPTERS["source"](Two())(stream(1)[0])


def test_a_classifier_needs_a_linear_head_with_two_classes_and_fitting_features():
    with pytest.raises(AdaptationError, match=r"expected a head of type nn.Linear, got Sequential"):
        Classifier(nn.Flatten(), nn.Sequential(nn.Linear(12, 3)))
    with pytest.raises(AdaptationError, match="at least two classes, got 1"):
        Classifier(nn.Flatten(), nn.Linear(12, 1))
    with pytest.raises(AdaptationError, match=r"expected features \(9, 7\), got \(9, 12\)"):
        ADAPTERS["source"](Classifier(nn.Flatten(), nn.Linear(7, 3)).double())(stream(1)[0])
