"""Every value that holds, with its meaning: what sections take over from shared blocks written out."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any, TextIO

from ruamel.yaml.comments import CommentedMap, CommentedSeq

from deepclust.config import Config, meanings
from deepclust.methods.parts.options import Shared
from tasks.shared.operations.params import overrides
from tasks.shared.operations.params.schema import Params


def show(values: Params, encoder: str | None, out: TextIO) -> None:
    """Write all parameters, or those of one encoder's pretraining, as YAML with comments.

    Raises:
        ConfigError: If there is no such encoder.
    """
    shared = values.pretrain.shared
    network = _commented(shared, leave_out=shared.may_be_left_out)
    if encoder is not None:
        found = CommentedMap({"seed": values.seed, "encoders": _flow({encoder: values.method(encoder)})})
        found["pretrain"] = CommentedMap({"shared": network, encoder: _section(values, encoder)})
    else:
        found = _commented(values)
        found["encoders"] = _flow(values.encoders)
        found["pretrain"]["shared"] = network
        for name in values.pretrain.encoders():
            found["pretrain"][name] = _section(values, name)
        for part, sections in (("cluster", values.cluster), ("adapt", values.adapt)):
            found[part].update({name: _commented(options) for name, options in sections.complete().items()})
    text = io.StringIO()
    overrides.round_trip().dump(found, text)
    out.write(re.sub(r"^(.*\S) +# ", r"\1  # ", text.getvalue(), flags=re.MULTILINE))


def _section(values: Params, encoder: str) -> CommentedMap:
    """An encoder's options, and the side of its images."""
    found = _commented(values.options(encoder))
    if "image_size" not in found:
        found.insert(0, "image_size", values.image_size(encoder), comment=meanings(Shared)["image_size"])
    return found


def _commented(options: Config, leave_out: tuple[str, ...] = ()) -> CommentedMap:
    found, texts = CommentedMap(), meanings(type(options))
    for field in dataclasses.fields(options):
        if field.name not in {"sections", *leave_out}:
            value = getattr(options, field.name)
            found[field.name] = _plain(value)
            if texts[field.name] and not isinstance(found[field.name], CommentedMap):
                found.yaml_add_eol_comment(texts[field.name], field.name)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return _commented(value)
    if isinstance(value, tuple):
        if any(isinstance(item, Config) for item in value):
            return CommentedSeq(_flow(vars(item)) for item in value)
        return _flow(list(value))
    return value


def _flow(value: Any) -> Any:
    """A mapping or list in one line."""
    if isinstance(value, dict):
        value = CommentedMap({name: _flow(item) for name, item in value.items()})
    elif isinstance(value, list | tuple):
        value = CommentedSeq(value)
    else:
        return value
    value.fa.set_flow_style()
    return value
