"""The declared type of a parameter, by its dotted path."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from deepclust.config import Config
from tasks.shared.operations.params.schema import Adapt, Cluster, Params, Pretrain


def members(path: Sequence[str], encoders: Any) -> set[Any]:
    """The types, and values of Literals, that a parameter may have; none if there is no such parameter.

    Args:
        path: Such as `("pretrain", "swav", "optimiser", "name")`.
        encoders: The method of each encoder, as params.yaml states it.
    """
    found: set[Any] = {Params}
    for part in path:
        found = {member for kind in found for below in _below(kind, part, encoders) for member in _each(below)}
    return found


def is_text(kinds: set[Any]) -> bool:
    """Whether every value of these types is text, but for null."""
    others = kinds - {type(None)}
    return bool(others) and all(kind is str or isinstance(kind, str) for kind in others)


def _below(kind: Any, part: str, encoders: Any) -> Iterator[Any]:
    """The types of what stands below a value under a key."""
    if isinstance(kind, type) and issubclass(kind, Config):
        field = kind.__pydantic_fields__.get(part)  # type: ignore[attr-defined]
        if field is not None and part != "sections":
            yield field.annotation
        elif issubclass(kind, Pretrain | Cluster | Adapt):
            yield from _section(kind, part, encoders)
        elif part == "method":  # an encoder's section may state it
            yield str
    elif get_origin(kind) is dict:
        yield get_args(kind)[1]
    elif get_origin(kind) is tuple:
        yield get_args(kind)[0]


def _section(kind: type[Config], name: str, encoders: Any) -> Iterator[type[Config]]:
    """The class of a section's options; modules of methods, algorithms and adapters are imported when asked for."""
    from deepclust.adaptation import ADAPTERS, fine_tuning
    from deepclust.adaptation.base import LearnerConfig
    from deepclust.clustering import algorithms, how_many
    from deepclust.methods import METHODS, config_class
    from deepclust.methods.parts.options import Shared

    if issubclass(kind, Cluster):
        if name == "how_many":
            yield how_many.Config
        elif name in algorithms.ALGORITHMS:
            yield algorithms.config_class(name)
    elif issubclass(kind, Adapt):
        adapters = {each: adapter.config_class for each, adapter in ADAPTERS.items()}
        yield from filter(None, [{**adapters, "shared": LearnerConfig, "fine_tune": fine_tuning.Config}.get(name)])
    elif name == "shared":
        yield Shared
    else:
        method = encoders.get(name, name) if isinstance(encoders, dict) else name
        yield from [config_class(method)] if method in METHODS else []


def _each(kind: Any) -> Iterator[Any]:
    """The members of a union, without annotations."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _each(get_args(kind)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _each(member)
    elif origin is Literal:
        yield from get_args(kind)
    else:
        yield kind
