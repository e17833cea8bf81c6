"""The methods by name. Each stands in the file of its name, which is read only when the method is asked for.

So a run of one method depends on no other's file: what trains SwAV need not be trained again when PCL changes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deepclust.config import Config, hint
from deepclust.errors import ConfigError

if TYPE_CHECKING:
    from deepclust.methods.parts.base import Method

# What each file offers beside its `Config`: a function that makes a frozen encoder, or the class of a trained method.
METHODS = {
    "pixels": "pixels",
    "random": "random",
    "pretrained": "pretrained",
    "swav": "SwAV",
    "deepcluster_v2": "DeepClusterV2",
    "moco": "MoCo",
    "pcl": "PCL",
    "simsiam": "SimSiam",
}


def config_class(name: str) -> type[Config]:
    """The class of a method's options.

    Args:
        name: One of `METHODS`.

    Raises:
        ConfigError: If there is no such method.
    """
    found: type[Config] = _of(name, "Config")
    return found


def method_class(name: str) -> type[Method]:
    """The class of a trained method.

    Args:
        name: One of `METHODS`.

    Raises:
        ConfigError: If there is no such method.
    """
    found: type[Method] = _of(name, METHODS.get(name, ""))
    return found


def _of(name: str, attribute: str) -> Any:
    if name not in METHODS:
        raise ConfigError(f"expected a method ({', '.join(METHODS)}), got {name!r}{hint(name, METHODS)}")
    return getattr(import_module(f"{__name__}.{name}"), attribute)
