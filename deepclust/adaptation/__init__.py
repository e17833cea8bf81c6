"""Test-time adaptation: one method a file, all with the contract of `base`.

adapter = Tent(model)  # or Tent(model, tent.Config(rate=1e-4)), from deepclust.adaptation.adapters
logits = adapter(images)
"""

from deepclust.adaptation.adapters.bn import BN
from deepclust.adaptation.adapters.lame import LAME
from deepclust.adaptation.adapters.pseudo_label import PseudoLabel
from deepclust.adaptation.adapters.roid import ROID
from deepclust.adaptation.adapters.rotta import RoTTA
from deepclust.adaptation.adapters.shot_im import ShotIM
from deepclust.adaptation.adapters.source import Source
from deepclust.adaptation.adapters.t3a import T3A
from deepclust.adaptation.adapters.tent import Tent
from deepclust.adaptation.adapters.tsd import TSD
from deepclust.adaptation.base import Adapter
from deepclust.adaptation.classifier import Classifier, WholeModel
from deepclust.adaptation.guard import Guard
from deepclust.adaptation.normalisation import align_statistics

__all__ = [
    "ADAPTERS",
    "BN",
    "LAME",
    "ROID",
    "T3A",
    "TSD",
    "Adapter",
    "Classifier",
    "Guard",
    "PseudoLabel",
    "RoTTA",
    "ShotIM",
    "Source",
    "Tent",
    "WholeModel",
    "align_statistics",
]

ADAPTERS: dict[str, type[Adapter]] = {
    adapter.name: adapter for adapter in (Source, BN, Tent, PseudoLabel, ShotIM, T3A, TSD, LAME, RoTTA, ROID)
}
