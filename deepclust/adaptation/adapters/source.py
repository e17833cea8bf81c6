"""Source: the model as it was trained, in eval mode. What every adapter has to beat."""

from __future__ import annotations

from deepclust.adaptation.base import Adapter


class Source(Adapter):
    """Predicts and learns nothing, so before and after, episodic or not, are the same."""

    name = "source"
    frozen = True
