"""Which parameters learn."""

import pytest
from torch import nn

from deepclust.adaptation import Classifier, WholeModel
from deepclust.adaptation.parameters import select_parameters
from deepclust.errors import AdaptationError


def test_parameters_are_selected_by_role():
    featurizer = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3))
    model = Classifier(featurizer, nn.Linear(3, 2))
    body = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias"]
    names = {"body": [f"featurizer.{name}" for name in body], "head": ["head.weight", "head.bias"]}
    names |= {"all": names["body"] + names["head"], "affine": [names["body"][index] for index in (2, 3, 6, 7)]}
    assert {which: list(select_parameters(model, which)) for which in names} == names
    assert select_parameters(model, "affine")["featurizer.4.bias"] is featurizer[4].bias


def test_a_whole_models_head_is_the_one_that_is_named_and_the_last_has_all_before_it_as_body():
    layers = nn.Sequential(nn.Linear(4, 3), nn.GroupNorm(1, 3), nn.Linear(3, 2))
    assert list(select_parameters(WholeModel(layers, head="0"), "head")) == ["model.0.weight", "model.0.bias"]
    assert list(select_parameters(WholeModel(layers), "affine")) == ["model.1.weight", "model.1.bias"]
    body = [f"model.{index}.{name}" for index in (0, 1) for name in ("weight", "bias")]
    assert list(select_parameters(WholeModel(layers), "body")) == body


def test_parameters_that_do_not_exist_are_an_error():
    for featurizer, which in ((nn.Flatten(), "body"), (nn.BatchNorm1d(12, affine=False), "affine")):
        with pytest.raises(AdaptationError, match=f"parameters '{which}': this model has none"):
            select_parameters(Classifier(featurizer, nn.Linear(12, 3)), which)
