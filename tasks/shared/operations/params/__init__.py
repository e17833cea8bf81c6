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


def read(path: Path = layout.PARAMS) -> dict[str, Any]:
    """The raw mapping of a parameter file.

    Raises:
        ConfigError: If the file is missing, is no YAML, or is no mapping.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"expected parameters in {path}, found none; run from the repository's root") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"expected sections in {path}, got {type(raw).__name__}")
    return raw


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
