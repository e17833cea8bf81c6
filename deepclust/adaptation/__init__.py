"""Test-time adaptation: one method a file, all with the contract of `base`."""

from collections.abc import Callable

from deepclust.adaptation.base import Adapter
from deepclust.adaptation.bn import BN
from deepclust.adaptation.source import Source
from deepclust.adaptation.tsd import TSD

ADAPTERS: dict[str, Callable[..., Adapter]] = {"source": Source, "bn": BN, "tsd": TSD}
