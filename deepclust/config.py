"""Options as frozen, keyword-only dataclasses that check themselves.

Each method, adapter and other component has a `Config` beside its class: the one place that states an option's type,
range, meaning and usual value. params.yaml is read into the same classes; there every option has to be stated.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, cast, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, PydanticCustomError

from deepclust.errors import ConfigError

_MOST = 2**31 - 1  # what every library takes for a whole number


def check_name(text: str) -> str:
    """The name of an encoder, which stands in paths and in the name of its model. Raises: ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", str(text)):
        raise ValueError(f"expected a name of at most 64 letters (a-z, A-Z), digits, _ and -, got {text!r}; rename it")
    return text


def _folder(text: str) -> str:
    if not text.strip() or "\0" in text or os.path.normpath(text) == os.curdir:
        raise ValueError(f"expected the path of a folder, got {text!r}; name one, such as path/to/images")
    if text.startswith("~"):
        raise ValueError(f"expected a path that DVC can follow, got {text!r}; write it out, without `~`")
    # DVC takes the first for a file of its own, and the second for the address of a remote.
    if os.path.normpath(text).endswith(".dvc") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):
        raise ValueError(f"expected a path that DVC can follow, got {text!r}; rename the folder")
    return text


def _grey_or_rgb(bands: tuple[int, ...]) -> tuple[int, ...]:
    if len(bands) not in (0, 1, 3):
        raise ValueError(f"expected one band (grey) or three (RGB), got {len(bands)}; mend the list")
    return bands


Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1)]
NotNegative = Annotated[float, Field(strict=True, ge=0)]
Seconds = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
Natural = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
Bands = Annotated[tuple[Natural, ...], AfterValidator(_grey_or_rgb)]
Several = Annotated[int, Field(strict=True, ge=2, le=_MOST)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Width = Annotated[int, Field(strict=True, ge=1, le=2**16)]  # of a layer
OptionalWidth = Annotated[int, Field(strict=True, ge=0, le=2**16)]
Few = Annotated[int, Field(strict=True, ge=1, le=64)]
MaxPixels = Annotated[int, Field(strict=True, ge=1, le=10**12)]
Pixels = Annotated[int, Field(strict=True, ge=8, le=1024)]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Side = Annotated[int, Field(strict=True, ge=1, le=4096)]  # of images that were saved, in pixels
Channels = Annotated[int, Field(strict=True, ge=1, le=64)]
Auto = Literal["auto"]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256 in hexadecimal
Backbone = Annotated[str, Field(pattern=r"^(small|medium|resnet18|resnet34|resnet50|timm/[A-Za-z0-9_.-]+)$")]
BY_NAME = Field(discriminator="name")  # for Annotated[One | Other, BY_NAME], whose `name` says which it is
Turn = Annotated[float, Field(strict=True, ge=0, le=0.5)]
Voters = Annotated[str, Field(pattern=r"^k[0-9]+_t[0-9.e+-]+$")]  # kNN's number of neighbours and temperature
SetShare = Annotated[float, Field(strict=True, gt=0, lt=1)]
AtLeastTen = Annotated[int, Field(strict=True, ge=10, le=_MOST)]
Severity = Annotated[int, Field(strict=True, ge=1, le=5)]
Name = Annotated[str, AfterValidator(check_name)]  # of an encoder; dots divide the paths of parameters, as DVC's
Folder = Annotated[str, AfterValidator(_folder)]  # that DVC depends on
NotEmpty = Field(min_length=1)  # for Annotated[tuple[…, ...], NotEmpty]

_FILE = "params.yaml"  # pydantic's context where a file is read, which states every option
_STATED = "every parameter is stated in params.yaml (`python -m tasks.params migrate` adds those that are new)"
_MOST_COMPLAINTS = 3
_LONGEST = 200  # characters of a value that are shown
_T = TypeVar("_T")
_C = TypeVar("_C", bound="type[Any]")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: _C) -> _C:
    """Make a subclass of `Config` a frozen, keyword-only dataclass; the string below a field is its meaning.

    Options that are unknown, of a wrong type, out of range or refused by `_check` raise a ConfigError of one line.
    """
    settings = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    made = dataclass(frozen=True, kw_only=True, config=settings)(cls)
    check = made.__init__

    @functools.wraps(check)
    def init(self: Any, **options: Any) -> None:
        try:
            check(self, **options)
        except ValidationError as error:
            raise ConfigError(explain(error, options)) from None

    made.__init__ = init  # type: ignore[method-assign]
    return cast("_C", made)


@config
class Config:
    """The options of a component."""

    inherits: ClassVar[tuple[str, ...]] = ()  # options that a section of params.yaml takes over from `shared`
    may_be_left_out: ClassVar[tuple[str, ...]] = ()  # options that params.yaml need not state

    def _check(self) -> None:
        """Raises ValueError, with the remedy, where options that are valid alone do not fit each other."""

    @model_validator(mode="before")
    @classmethod
    def _known_and_stated(cls, value: Any, info: ValidationInfo) -> Any:
        given = value.kwargs if isinstance(value, ArgsKwargs) else value
        if not isinstance(given, dict):
            return value
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                which = f" of {given['name']}" if "name" in given else ""
                raise PydanticCustomError("unknown", f"unknown parameter{which}{hint(name, known)}", {"key": str(name)})
        missing = [name for name in known if name not in {*given, *cls.may_be_left_out}]
        if info.context == _FILE and missing:
            others = f", as are {', '.join(missing[1:])}" if missing[1:] else ""
            raise PydanticCustomError("missing", f"missing{others}; {_STATED}", {"key": missing[0]})
        return value

    @model_validator(mode="after")
    def _fit_each_other(self) -> Self:
        self._check()
        return self

    def replaced(self, **changes: Any) -> Self:
        """The same options but for the changes, checked again. Raises: ConfigError."""
        return type(self)(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | changes)


def as_dict(options: Config) -> dict[str, Any]:
    """Plain dicts, lists and numbers, as YAML or JSON has them."""
    values: dict[str, Any] = TypeAdapter(type(options)).dump_python(options, mode="json")
    return values


def meanings(kind: type[Config]) -> dict[str, str]:
    """The meaning of each option, in one line."""
    found = {field.name: "" for field in dataclasses.fields(kind)}
    for base in reversed(kind.__mro__):
        for name, field in getattr(base, "__pydantic_fields__", {}).items():
            found[name] = " ".join((field.description or found[name]).split())
    return found


def parse(kind: type[_T], raw: Any, path: str) -> _T:
    """A component's options, all of which a parameter file states.

    Args:
        kind: The class of the options.
        raw: What the file states.
        path: Where in the file this stands, such as `pretrain.swav`.

    Raises:
        ConfigError: With the dotted path, what was expected and what came, and the nearest name of an unknown option.
    """
    try:
        return TypeAdapter(kind).validate_python(raw, context=_FILE)
    except ValidationError as error:
        raise ConfigError(explain(error, raw, path)) from None


def check_fields(raw: Any, stated: Mapping[str, Any], optional: Mapping[str, Any]) -> None:
    """Check a mapping that was read from a file.

    Args:
        raw: What was read.
        stated: The types of keys that it must have.
        optional: The types of keys that it may have; all others are not looked at.

    Raises:
        ConfigError: With the dotted path, what was expected and what came.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"expected a mapping, got {reprlib.repr(raw)}")
    if absent := [name for name in stated if name not in raw]:
        raise ConfigError(f"expected {', '.join(absent)}, found none")
    for name, kind in {**stated, **optional}.items():
        if name in raw:
            try:
                TypeAdapter(kind).validate_python(raw[name])
            except ValidationError as error:
                raise ConfigError(explain(error, raw[name], name)) from None


def explain(error: ValidationError, raw: Any, path: str = "") -> str:
    """At most three complaints in one line, each with its dotted path; what came is said once a path."""
    found: dict[str, list[str]] = {}
    came: dict[str, str] = {}
    for item in error.errors():
        key, message = _complaint(item)
        place = ".".join(filter(None, [path, *_visible(item["loc"], raw), key]))
        found.setdefault(place, []).append(message)
        if item["type"] != "value_error" and not key:
            came[place] = f", got {_shown(item)}"
    # A complaint about a whole list goes where one of its items has its own.
    inner = [place for place in found if not any(other.startswith(f"{place}.") for other in found)]
    lines = [f"{place}: {' or '.join(found[place])}{came.get(place, '')}" for place in inner]
    return "; ".join(lines[:_MOST_COMPLAINTS]).removeprefix(": ").replace(" or expected ", " or ")


def _complaint(item: Any) -> tuple[str, str]:
    """The key that one of pydantic's errors is about, where its location leaves it out, and the message."""
    context = item.get("ctx", {})
    if item["type"] in ("unknown", "missing"):
        return str(context.get("key", "")), str(item["msg"])
    if item["type"] == "union_tag_invalid":
        known = context["expected_tags"].replace("'", "")
        return context["discriminator"].strip("'"), f"one of {known} is expected, got {context['tag']!r}"
    if item["type"] == "union_tag_not_found":
        return context["discriminator"].strip("'"), f"missing; {_STATED}"
    if item["type"] == "value_error":
        return "", str(item["msg"]).removeprefix("Value error, ")
    if item["type"] in ("dataclass_type", "dict_type", "model_attributes_type"):
        return "", "expected a mapping"
    return "", re.sub(r"^(Input|String) should (be )?", "expected ", item["msg"]).replace("expected match", "expected")


def _visible(location: Iterable[int | str], raw: Any) -> list[str]:
    """The parts of pydantic's location that the user wrote; the others name members of unions."""
    parts = []
    for part in location:
        items = dict(enumerate(raw)) if isinstance(raw, list | tuple) else raw
        if isinstance(items, Mapping) and part in items:
            raw = items[part]
            parts.append(str(part) if str(part).isprintable() else repr(part)[1:-1])
    return parts


def _shown(item: Any) -> str:
    """What came, and the remedy for text that YAML reads as a date, a number or a truth value."""
    value = as_dict(item["input"]) if isinstance(item["input"], Config) else item["input"]
    shown = str(value) if isinstance(value, datetime.date) else repr(value)
    shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} …"
    unquoted = item["type"] == "string_type" and isinstance(value, datetime.date | int | float)
    return f"{shown}; put it into quotes" if unquoted else shown


def hint(word: object, known: Iterable[str]) -> str:
    """The nearest known word, as the end of a message; empty if none is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
