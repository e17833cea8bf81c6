"""The methods by name."""

from deepclust.methods.base import Method
from deepclust.methods.pcl import PCL
from deepclust.methods.simsiam import SimSiam
from deepclust.methods.swav import SwAV

__all__ = ["METHODS", "Method"]

METHODS: dict[str, type[Method]] = {"swav": SwAV, "pcl": PCL, "simsiam": SimSiam}
