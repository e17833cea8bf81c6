"""The options of adapters in params.yaml are those of the adapters, and what contradicts itself is refused there."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest

from deepclust.adaptation import ADAPTERS, shifts
from deepclust.corruptions import CORRUPTIONS
from deepclust.errors import AdaptationError, ConfigError
from tasks.adapt import __main__ as adapt
from tasks.shared.operations import params
from tasks.shared.operations.params import adapt as schema
from tests.paths import ROOT
from tests.tasks import shift_workspace


def raw() -> dict[str, Any]:
    return params.read(ROOT / "params.yaml")


def test_names_of_adapters_corruptions_and_settings_are_those_there_are() -> None:
    assert set(get_args(schema.AdapterName)) == set(ADAPTERS)
    assert set(get_args(schema.Corruption)) == set(CORRUPTIONS)
    assert set(get_args(schema.Adapt.model_fields["settings"].annotation)[0].__args__) == set(shifts.SETTINGS)


def test_options_of_an_adapter_are_those_of_the_parameters_and_known_to_it() -> None:
    stated = raw()["adapt"]
    values = params.load(ROOT / "params.yaml").adapt.model_copy(update={"adapters": tuple(ADAPTERS)})
    found = adapt.options_of(values)
    assert found.pop("source") == {}
    assert set(found) == set(ADAPTERS) - {"source"}
    for name, options in found.items():
        assert options == {key: float(value) if key == "rate" else value for key, value in stated[name].items()}
        known = {
            each.name
            for each in inspect.signature(ADAPTERS[name]).parameters.values()
            if each.kind is each.KEYWORD_ONLY
        }
        if name != "tsd":  # which has options for the library alone
            assert set(options) == known
        assert set(options) <= known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compat": "original", "steps": 2},
            "^adapt.tsd: compat 'original' means steps 1, got 2; make it 1, or compat",
        ),
        ({"local_weight": 0.0, "parameters": "head"}, "^adapt.tsd: .* no gradient reaches parameters head"),
        ({"affinity": "linear", "neighbours": 5}, "^adapt.lame: affinity 'linear' has no neighbours, got 5"),
        ({"compat": "original", "local_weight": 0.0, "filter_k": 7}, None),
        ({"affinity": "linear"}, None),
    ],
)
def test_options_that_contradict_each_other_are_refused_as_parameters_where_the_adapter_would_refuse_them(
    options: dict[str, Any], message: str | None
) -> None:
    """Left to the adapter, it would be absent from the table, and everything else measured."""
    name = "lame" if "affinity" in options else "tsd"
    values = raw()
    values["adapt"][name] |= options
    model = shift_workspace.classifier_of("small")
    if message is None:
        ADAPTERS[name](model, **adapt.options_of(params.parse(values).adapt)[name])
    else:
        with pytest.raises(ConfigError, match=message):
            params.parse(values)
        with pytest.raises(AdaptationError):
            ADAPTERS[name](model, **values["adapt"][name])
