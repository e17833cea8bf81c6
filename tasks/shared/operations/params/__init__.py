"""params.yaml as typed, frozen values. What may be said stands in `schema`.

Every value stands in params.yaml, which DVC tracks by value, and nothing here has a default: so no code of this folder
can change an output.
"""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from deepclust.errors import ConfigError
from tasks.shared.operations.params.fields import Section, hint
from tasks.shared.operations.params.schema import Params
from tasks.shared.outputs import layout


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-4 as a number, where YAML 1.1 sees a string, and refuses a key that comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is stated twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(path: Path = layout.PARAMS) -> dict[str, Any]:
    """The raw mapping of a parameter file.

    Raises:
        ConfigError: If the file is missing, is no YAML, or is no mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"expected parameters in {path}, found none; run from the repository's root") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"expected sections in {path}, got {type(raw).__name__}")
    return raw


def parse(raw: dict[str, Any]) -> Params:
    """Validate a raw mapping.

    Raises:
        ConfigError: With the dotted path, what was expected, what came, and the nearest valid name of an unknown key.
    """
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_lines(error.errors())) from error


def _lines(errors: list[Any]) -> str:
    """At most three complaints, each with the path as the user wrote it; what came is said once a path."""
    found: dict[str, list[str]] = {}
    came: dict[str, str] = {}
    for item in errors:
        path, message = _complaint(item)
        found.setdefault(path, []).append(message)
        if message.startswith("expected"):
            came[path] = f", got {item['input']!r}"
    # What is wrong inside a list says more than that the list is no number either.
    found = {path: texts for path, texts in found.items() if not any(other.startswith(f"{path}.") for other in found)}
    return "; ".join(f"{path}: {' or '.join(texts)}{came.get(path, '')}" for path, texts in list(found.items())[:3])


def _complaint(item: Any) -> tuple[str, str]:
    """Path and message of one of pydantic's errors."""
    visible, section = _walk(item["loc"])
    path = ".".join(visible) or "params.yaml"
    if item["type"] == "extra_forbidden":
        return path, f"unknown parameter{hint(visible[-1], list(section.model_fields) if section else [])}"
    if item["type"] == "missing":
        return path, "missing; every parameter is stated in params.yaml"
    if item["type"] == "union_tag_invalid":
        field = item["ctx"]["discriminator"].strip("'")
        known = item["ctx"]["expected_tags"].replace("'", "")
        return f"{path}.{field}", f"one of {known} is expected, got {item['ctx']['tag']!r}"
    if item["type"] == "union_tag_not_found":
        field = item["ctx"]["discriminator"].strip("'")
        return f"{path}.{field}", "missing; every parameter is stated in params.yaml"
    if item["type"] == "value_error":
        return path, item["msg"].removeprefix("Value error, ")
    return path, re.sub(r"^Input should (be )?", "expected ", item["msg"])


def _walk(location: tuple[int | str, ...]) -> tuple[list[str], type[Section] | None]:
    """The path as the user wrote it, and the section that its last part stands in.

    pydantic's locations also name the members of unions, and `Pretrain` gathers the encoders: neither is in the file.
    """
    visible: list[str] = []
    section: type[Section] | None = None
    kind: Any = Params
    for part in map(str, location):
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        if kind is None or get_origin(kind) in (Union, types.UnionType):
            kind = _member(kind, part)
            continue
        if isinstance(kind, type) and issubclass(kind, Section):
            section = kind
            kind = kind.model_fields[part].annotation if part in kind.model_fields else None
        else:
            kind = get_args(kind)[1 if get_origin(kind) is dict else 0] if get_args(kind) else None
        if (*visible, part) != ("pretrain", "encoders"):
            visible.append(part)
    return visible, section


def _member(union: Any, part: str) -> Any:
    """The member of a union that a location goes into: a section by its tag, or the list."""
    for member in get_args(union):
        bare = get_args(member)[0] if get_origin(member) is Annotated else member
        if get_origin(bare) is tuple and part.startswith("tuple"):
            return bare
        if isinstance(bare, type) and issubclass(bare, Section) and part in _tags(bare):
            return bare
    return None


def _tags(section: type[Section]) -> set[str]:
    """Values that a section's literals take: `sgd` is the tag of SGD."""
    literals = (info.annotation for info in section.model_fields.values() if get_origin(info.annotation) is Literal)
    return {str(value) for literal in literals for value in get_args(literal)}


def load(path: Path = layout.PARAMS) -> Params:
    """Read and validate params.yaml. Raises: ConfigError, in one line."""
    return parse(read(path))
