"""Source: the model as it was trained, in eval mode. What every adapter has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from deepclust.adaptation.base import Adapter


class Source(Adapter):
    """Predicts and learns nothing, so before and after, episodic or not, are the same."""

    name = "source"

    @torch.no_grad()
    def _adapt(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits
