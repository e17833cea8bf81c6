"""Edits of params.yaml that keep its comments, order and layout.

    python -m tasks.overrides pretrain.swav.epochs=5 'encoders=[pixels, swav]'

An edit is checked as a whole before anything is written, is written whole or not at all, is shown as a diff, and stays.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from deepclust.errors import ConfigError
from tasks.shared.operations import params
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.params import declared
from tasks.shared.operations.params.schema import Params, merged
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout


def apply(overrides: Sequence[str], path: Path = layout.PARAMS) -> str:
    """Write overrides such as `pretrain.swav.epochs=5` into a parameter file.

    A parameter that is declared as text takes the text as it is, or what YAML's quotes around it hold. Other values are
    YAML, so `[pixels, swav]` is a list. A list is replaced as a whole; `encoders` may be a list of names, whose methods
    are those that they had, or their own names.

    Returns:
        The change as a unified diff, empty if the values stood there already.

    Raises:
        ConfigError: If an override has no `=`, names an unknown parameter, or makes the file invalid; the file stays
            as it was then.
    """
    return _edit(path, lambda document: _set_all(document, overrides), write=True)[0]


def preview(overrides: Sequence[str], path: Path = layout.PARAMS) -> Params:
    """The parameters as `apply` would write them. Raises: ConfigError as `apply`; the file stays as it is."""
    values = _edit(path, lambda document: _set_all(document, overrides), write=False)[1]
    assert values
    return values


def apply_recipe(recipe: Path, path: Path = layout.PARAMS) -> str:
    """Write a recipe over a parameter file: a YAML file with some of its keys, the rest stays.

    A list is replaced as a whole, and so is a mapping whose `name` changes: an optimiser takes none of another's
    options with it.

    Returns:
        The change as a unified diff, empty if the values stood there already.

    Raises:
        ConfigError: If the recipe can not be read, names an unknown parameter, or makes the file invalid; the file
            stays as it was then.
    """
    if not recipe.is_file():
        known = ", ".join(sorted(str(file) for file in recipe.parent.glob("*.yaml"))) or "none there"
        raise ConfigError(f"expected a recipe in {recipe}, found none; there are: {known}")
    changes = params.read(recipe)
    try:
        return _edit(path, lambda document: _merge(document, _news(document, changes)), write=True)[0]
    except ConfigError as error:
        raise ConfigError(f"{recipe}: {error}") from error


def _news(document: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes without what a section says already through its group's `shared`."""
    left = dict(changes)
    for group in ("pretrain", "adapt"):
        stated = changes.get(group)
        shared = document.get(group, {}).get("shared", {})
        if not isinstance(stated, dict) or not isinstance(shared, dict):
            continue
        shared = merged(shared, stated.get("shared", {}))
        left[group] = {name: _not_said(document[group].get(name), section, shared) for name, section in stated.items()}
    return left


def _not_said(own: Any, section: Any, shared: Any) -> Any:
    if not isinstance(section, dict) or not isinstance(own, dict):
        return section
    holds = merged({key: value for key, value in shared.items() if key in section}, own)
    return {key: value for key, value in section.items() if key not in shared or holds.get(key) != value}


def _merge(document: Any, changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        old = document.get(key)
        same_kind = isinstance(old, dict) and isinstance(value, dict) and value.get("name") in (None, old.get("name"))
        if same_kind:
            _merge(old, value)
        elif key in document and old != value:
            document[key] = styled(value)
        elif key not in document:
            _add(document, key, styled(value))


def _add(section: Any, key: str, value: Any) -> None:
    """Put a new key behind the first, as what follows the last one, an empty line, belongs to it."""
    section.insert(min(1, len(section)), key, value)


def styled(value: Any) -> Any:
    """A plain value laid out as params.yaml does it: in one line, but for a list of mappings, one a line."""
    if isinstance(value, dict):
        mapping = CommentedMap({key: styled(item) for key, item in value.items()})
        mapping.fa.set_flow_style()
        return mapping
    if isinstance(value, list):
        items = CommentedSeq(map(styled, value))
        if not any(isinstance(item, dict) for item in value):
            items.fa.set_flow_style()
        return items
    if isinstance(value, str) and not value.isprintable():
        return DoubleQuotedScalarString(value)  # in other quotes, some line breaks would be read as blanks
    return value


def _set_all(document: Any, overrides: Sequence[str]) -> None:
    for override in overrides:
        _set(document, override)


def name_methods(document: Any, earlier: Any) -> None:
    """Turn a list of encoders into a mapping of each to its method, in place.

    The section of an encoder that drops out says its method from then on, if its name does not.

    Args:
        document: The parameters.
        earlier: The encoders before the change, whose methods stay.
    """
    names = document.get("encoders")
    if not isinstance(names, list):
        return
    if others := [name for name in names if not isinstance(name, str)]:
        raise ConfigError(f"encoders: expected names, got {others[0]}; put it into quotes")
    if len(set(names)) < len(names):
        raise ConfigError(f"encoders: expected distinct names, got {', '.join(names)}; leave out the second")
    known = earlier if isinstance(earlier, dict) else {}
    sections = document.get("pretrain", {})
    methods = {}
    for name in names:
        section = sections.get(name)
        stated = section.pop("method", None) if isinstance(section, dict) else None
        methods[name] = stated or known.get(name, name)
    for name, method in known.items():
        if name not in methods and name != method and isinstance(own := sections.get(name), CommentedMap):
            own.insert(0, "method", method)
    document["encoders"] = styled(methods)


def rewrite(path: Path, change: Callable[[Any], None]) -> str:
    """Change a parameter file, or a recipe, in place; the change as a unified diff, empty if there is none.

    Raises:
        ConfigError: If a file with all sections is invalid afterwards; it stays as it was then.
    """
    return _edit(path, change, write=True, whole="seed" in params.read(path))[0]


def _edit(path: Path, change: Callable[[Any], None], *, write: bool, whole: bool = True) -> tuple[str, Params | None]:
    """The change as a diff, and the parameters after it; everything is checked before anything is written."""
    params.read(path)  # a missing or broken file is reported in the usual words
    path = path.resolve()  # what a link points to is changed, not the link
    before = path.read_text(encoding="utf-8")
    yaml = round_trip()
    document = yaml.load(before)
    earlier = document.get("encoders")
    change(document)
    name_methods(document, earlier)
    text = io.StringIO()
    yaml.dump(document, text)
    after = _with_old_gaps(before, text.getvalue())
    difference = "".join(
        difflib.unified_diff(before.splitlines(True), after.splitlines(True), path.name, path.name, n=1)
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # others may look at the same file at once
    try:
        partial.write_text(after, encoding="utf-8")
        values = params.load(partial) if whole else None
        if write and difference:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return difference, values


def _with_old_gaps(before: str, after: str) -> str:
    """Comments as far behind their values as they were; ruamel.yaml keeps their columns instead."""
    old, new = before.splitlines(True), after.splitlines(True)
    for kind, low, high, start, stop in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "replace" and high - low == stop - start:
            for index, line in zip(range(start, stop), old[low:high], strict=True):
                comment = re.search(r"(\s+)(#.*\n?)$", line)
                if comment and new[index].endswith(comment[2]):
                    new[index] = new[index].removesuffix(comment[2]).rstrip() + comment[0]
    found, plain = "".join(new), YAML(typ="safe", pure=True)
    return found if plain.load(found) == plain.load(after) else after  # a text may hold what looks like a comment


def round_trip() -> YAML:
    """A YAML reader and writer that leaves every line as it is that it need not change."""
    yaml = YAML(typ="rt")  # keeps comments, and constructs no Python objects
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def _set(document: Any, override: str) -> None:
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted:
        raise ConfigError(f"expected an override like pretrain.swav.epochs=5, got {override!r}")
    value = _value(text, dotted, document.get("encoders"))
    *parents, last = dotted.split(".")
    above = here = document
    for depth, part in enumerate(parents):
        if depth == 2 and isinstance(here, dict) and part not in here:
            _take_over(document[parents[0]].get("shared"), here, part)
        above, here = here, _child(here, part, ".".join(parents[: depth + 1]))
    if isinstance(here, list):
        _child(here, last, dotted)
        here[int(last)] = value
    elif isinstance(here, CommentedMap):
        # A key that is new here may still be valid (an encoder, its method): validation decides, and names the nearest.
        if last == "name" and here.get("name", _inherited_name(document, parents)) != value:
            above[parents[-1]] = styled({last: value})  # an optimiser takes none of another's options along
        elif parents == ["pretrain"] and last not in here:
            here.insert(max(0, len(here) - 1), last, value)  # a section; the empty line below belongs to the last one
        elif last in here or len(parents) < 2:
            here[last] = value
        else:
            _add(here, last, value)
    else:
        raise ConfigError(f"{dotted}: {'.'.join(parents)} is {here!r} and has no parameters below it")


def _value(text: str, dotted: str, encoders: Any) -> Any:
    """What stands behind an override's `=`, by the declared type of its parameter."""
    kinds = declared.members(dotted.split("."), encoders)
    if declared.is_text(kinds) and (text or type(None) not in kinds):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{dotted}: expected text in UTF-8, got {text!r}; rename it")  # DVC can not read it
        return None if type(None) in kinds and text in ("null", "~") else _text(text)
    try:
        value = round_trip().load(text)
        params.check_extent(value)
        return value
    except RecursionError:
        raise ConfigError(f"{dotted}: {params.TOO_DEEP}") from None
    except ConfigError as error:
        raise ConfigError(f"{dotted}: {error}") from None
    except (YAMLError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{dotted}: expected a YAML value, got {text!r}; quote lists in the shell") from error


def _text(text: str) -> Any:
    """The text as it is, or what YAML's quotes around it hold."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        with contextlib.suppress(YAMLError):
            quoted = round_trip().load(text)
            return quoted if isinstance(quoted, str) else text
    return styled(text)


def _inherited_name(document: Any, parents: Sequence[str]) -> Any:
    """The `name` that a part of a section takes over from its group's `shared`."""
    here = document[parents[0]].get("shared") if len(parents) > 2 else None
    for part in parents[2:]:
        here = here.get(part) if isinstance(here, dict) else None
    return here.get("name") if isinstance(here, dict) else None


def _take_over(shared: Any, section: dict[str, Any], key: str) -> None:
    """Make a section state a block of its group's `shared`, so that a part of it can be changed: a list as it is."""
    block = shared.get(key) if isinstance(shared, dict) else None
    if isinstance(block, dict):
        _add(section, key, styled({}))
    elif isinstance(block, list):
        _add(section, key, styled([dict(item) for item in block]))


def _child(parent: Any, part: str, dotted: str) -> Any:
    """The value below `parent`; a part of digits counts the items of a list from 0."""
    if isinstance(parent, list):
        if part.isdigit() and int(part) < len(parent):
            return parent[int(part)]
        raise ConfigError(f"{dotted}: expected an item from 0 to {len(parent) - 1}, got {part!r}")
    if isinstance(parent, dict) and part in parent:
        return parent[part]
    near = difflib.get_close_matches(part, list(parent) if isinstance(parent, dict) else [], n=1, cutoff=0.5)
    raise ConfigError(f"{dotted}: unknown parameter" + (f"; did you mean {near[0]}?" if near else ""))


def main() -> None:
    """Change params.yaml from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.overrides",
        description="Change params.yaml in place, keeping its comments; print the change as a diff.",
        epilog="example: python -m tasks.overrides pretrain.swav.epochs=5 'encoders=[pixels, swav]'",
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="KEY=VALUE", help="dotted path, and text or a YAML value; lists as a whole"
    )
    arguments = parser.parse_args()
    with errors_as_one_line():
        say(*(apply(arguments.overrides) or f"{layout.PARAMS} says so already").split("\n"))
