"""The methods by name."""

from deepclust.methods.base import Method
from deepclust.methods.deepcluster_v2 import DeepClusterV2
from deepclust.methods.moco import MoCo
from deepclust.methods.pcl import PCL
from deepclust.methods.simsiam import SimSiam
from deepclust.methods.swav import SwAV

__all__ = ["METHODS", "Method"]

METHODS: dict[str, type[Method]] = {
    "swav": SwAV,
    "deepcluster_v2": DeepClusterV2,
    "moco": MoCo,
    "pcl": PCL,
    "simsiam": SimSiam,
}
