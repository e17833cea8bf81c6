"""The methods by name. Each stands in the file of its name, which is read only when the method is asked for.

So a run of one method depends on no other's file: what trains SwAV need not be trained again when PCL changes.
"""

from importlib import import_module

from deepclust.errors import ConfigError
from deepclust.methods.parts.base import Method

__all__ = ["METHODS", "Method", "method_class"]

METHODS = {
    "swav": "SwAV",
    "deepcluster_v2": "DeepClusterV2",
    "moco": "MoCo",
    "pcl": "PCL",
    "simsiam": "SimSiam",
}


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: One of `METHODS`.

    Raises:
        ConfigError: If there is no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"expected a method ({', '.join(METHODS)}), got {name!r}")
    found: type[Method] = getattr(import_module(f"deepclust.methods.{name}"), METHODS[name])
    return found
