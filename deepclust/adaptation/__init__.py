"""Test-time adaptation: one method a file, all with the contract of `base`.

adapter = Tent(model)
logits = adapter(images)
"""

from collections.abc import Callable

from deepclust.adaptation.base import Adapter
from deepclust.adaptation.bn import BN
from deepclust.adaptation.classifier import Classifier, WholeModel
from deepclust.adaptation.lame import LAME
from deepclust.adaptation.pseudo_label import PseudoLabel
from deepclust.adaptation.roid import ROID
from deepclust.adaptation.rotta import RoTTA
from deepclust.adaptation.shot_im import ShotIM
from deepclust.adaptation.source import Source
from deepclust.adaptation.t3a import T3A
from deepclust.adaptation.tent import Tent
from deepclust.adaptation.tsd import TSD

__all__ = [
    "ADAPTERS",
    "BN",
    "LAME",
    "ROID",
    "T3A",
    "TSD",
    "Adapter",
    "Classifier",
    "PseudoLabel",
    "RoTTA",
    "ShotIM",
    "Source",
    "Tent",
    "WholeModel",
]

ADAPTERS: dict[str, Callable[..., Adapter]] = {
    adapter.name: adapter for adapter in (Source, BN, Tent, PseudoLabel, ShotIM, T3A, TSD, LAME, RoTTA, ROID)
}
