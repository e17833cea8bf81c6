"""Source: the model as it was trained, in eval mode. What every adapter has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from deepclust.adaptation.base import Adapter
from deepclust.adaptation.classifier import Classifier


def configure_model(model: Classifier) -> Classifier:
    """Eval mode, without gradients. In place."""
    return model.eval().requires_grad_(False)


class Source(Adapter):
    """Predicts and learns nothing, so before and after, episodic or not, are the same.

    Args:
        model: The source model; copied.
        episodic: As for all adapters.
        predict: As for all adapters.
    """

    name = "source"

    def _configure(self, model: Classifier) -> Classifier:
        return configure_model(model)

    @torch.no_grad()
    def _adapt(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits
