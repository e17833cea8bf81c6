"""params.yaml as typed, frozen values, read by the rules of YAML 1.2, as DVC does; `schema` says what may be said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from deepclust import config
from deepclust.errors import ConfigError
from tasks.shared.operations.params.schema import Params
from tasks.shared.outputs import layout

_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000
_DEEPEST = 32
TOO_DEEP = f"expected at most {_DEEPEST} levels, got more; write it flat"
_LARGEST = 10**100  # beyond any parameter's range, and far below what Python refuses to print


def read(path: Path = layout.PARAMS) -> dict[str, Any]:
    """The raw mapping of a parameter file.

    Raises:
        ConfigError: If there is no such file, or it is no YAML, no mapping, or out of all proportion.
    """
    if not path.exists():
        raise ConfigError(f"expected parameters in {path}, found none; run from the repository's root")
    if not path.is_file():
        raise ConfigError(f"expected parameters in {path}, which is no file; remove it and restore the file")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ConfigError(f"expected parameters in {path}, got {size} bytes, more than {_MOST_BYTES}; mend the file")
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        check_extent(raw)
    except (RecursionError, ConfigError) as error:
        raise ConfigError(f"{path}: {error if isinstance(error, ConfigError) else TOO_DEEP}") from None
    except (YAMLError, ValueError, LookupError, TypeError) as error:  # ruamel.yaml lets those of odd tags through
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except PermissionError:
        raise ConfigError(f"expected to read {path}, have no permission to; give it (chmod u+r)") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"expected sections in {path}, got {type(raw).__name__}")
    return raw


def check_extent(value: Any) -> None:
    """Refuse what is small in a file and endless to work with.

    Raises:
        ConfigError: If values are nested too deep or in themselves, too many, or a number has hundreds of digits.
    """
    _count(value, 0, {})


def _count(value: Any, depth: int, known: dict[int, int]) -> int:
    """Number of values in a value, where an alias counts as often as it stands there: so it is printed and merged."""
    if depth > _DEEPEST:
        raise ConfigError(TOO_DEEP)
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ConfigError("expected numbers of at most 100 digits, got a longer one; shorten it")
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        items = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(item, depth + 1, known) for item in items)
        if known[id(value)] > _MOST_VALUES:
            raise ConfigError(f"expected at most {_MOST_VALUES} values, got more by aliases; write the file out")
    return known[id(value)]


def parse(raw: dict[str, Any], *, whole: bool = True) -> Params:
    """Validate a raw mapping.

    Args:
        raw: The mapping.
        whole: Whether to read the sections of all methods and adapters too, which imports torch and takes seconds.

    Raises:
        ConfigError: With the dotted path, what was expected, what came, and the nearest valid name of an unknown key.
    """
    values = config.parse(Params, raw, "")
    if whole:
        values.check()
    return values


def load(path: Path = layout.PARAMS, *, whole: bool = True) -> Params:
    """Read and validate params.yaml; see `parse`. Raises: ConfigError, in one line."""
    return parse(read(path), whole=whole)
