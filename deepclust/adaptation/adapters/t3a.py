"""T3A: Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization (NeurIPS 2021).

A class is represented by the confident features that the head has given it so far, beginning with its own weight rows;
a sample's logits are its products with the classes' prototypes. No gradient, and the model stays in eval mode with its
running statistics, as published: its gain is the head's alone. As there too, a batch is in the bank before it is
predicted (`predict="before"` takes the bank without it), labels and entropies are the source head's, and the head's
bias is in these alone. Deliberately different from the authors' code:
- `filter_k=None` keeps all; in the code -1 drops the least confident of each class at every batch;
- each weight row begins as a member of its own class, so that no class is ever without members; the code gives it to
  the class that the head predicts for it, and a class left empty has the logit 0, the largest of all wherever the
  others are negative.

Shapes: B images, C classes, D features, M members of the bank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.adaptation.adapters.tent import entropy
from deepclust.adaptation.bank import check_bank, class_sums
from deepclust.adaptation.base import ANOTHER_MODEL, Adapter, AdapterConfig, Predict
from deepclust.adaptation.classifier import Classifier
from deepclust.config import Count, config
from deepclust.errors import AdaptationError


@config
class Config(AdapterConfig):
    """T3A's options."""

    filter_k: Count | None = 100
    """Members kept per pseudo-class; None keeps all. The paper chooses among 1, 5, 20, 50, 100 and all."""
    predict: Predict = "after"
    """Whether a batch is predicted with the bank `before` or `after` it was added."""


class Supports(NamedTuple):
    """The bank, by class, and in each class by entropy.

    Attributes:
        features: (M, D), of length 1.
        labels: (M,) pseudo-classes, ascending.
        entropies: (M,) of the source head's predictions.
    """

    features: Tensor
    labels: Tensor
    entropies: Tensor


def supports(features_BD: Tensor, labels_B: Tensor, logits_BC: Tensor) -> Supports:
    """Samples as members of a bank, in their own order."""
    return Supports(F.normalize(features_BD, dim=1), labels_B, entropy(logits_BC))


def keep(bank: Supports, *, filter_k: int | None) -> Supports:
    """Order members by class and entropy and keep the first `filter_k` of each class; of equal ones the older stays.

    `filter_k=None` keeps all: memory and time then grow along the stream.
    """
    order_M = bank.entropies.argsort(stable=True)
    order_M = order_M[bank.labels[order_M].argsort(stable=True)]
    bank = Supports(*(column[order_M] for column in bank))
    if filter_k is None:
        return bank
    # Where a class begins is the number of members in lower classes.
    rank_M = torch.arange(len(bank.labels), device=bank.labels.device) - torch.searchsorted(bank.labels, bank.labels)
    return Supports(*(column[rank_M < filter_k] for column in bank))


def prototypes(bank: Supports, classes: int) -> Tensor:
    """Sums (C, D) of each class's members, scaled to length 1."""
    return F.normalize(class_sums(bank.features, bank.labels, classes), dim=1)


class T3A(Adapter):
    """Predicts by prototypes of the confident features seen so far.

    With `filter_k` the bank holds at most `filter_k` members a class, so neither memory nor time grow along a stream.

    Attributes:
        bank: The members; starts with the head's weight rows, one for each class.
    """

    name = "t3a"
    config_class = Config
    frozen = True
    config: Config
    bank: Supports

    def _check_model(self, model: Classifier) -> None:
        model.check_head()

    @torch.no_grad()
    def _start(self) -> None:
        rows_CD = self.model.head.weight
        classes_C = torch.arange(len(rows_CD), device=rows_CD.device)
        self.bank = supports(rows_CD, classes_C, self.model.head(rows_CD))

    @torch.no_grad()
    def _adapt(self, images: Tensor) -> Tensor:
        features_BD, logits_BC = self.model.outputs(images)
        before, batch = self.bank, supports(features_BD, logits_BC.argmax(dim=1), logits_BC)
        joined = Supports(*(torch.cat(pair) for pair in zip(before, batch, strict=True)))
        self.bank = keep(joined, filter_k=self.config.filter_k)
        used = self.bank if self.config.predict == "after" else before
        return features_BD @ prototypes(used, logits_BC.shape[1]).T

    def _state(self) -> dict[str, Any]:
        return {"classes": self.model.head.out_features, "bank": self.bank._asdict()}

    def _check_state(self, state: dict[str, Any]) -> None:
        classes = self.model.head.out_features
        if state["classes"] != classes:
            raise AdaptationError(
                f"expected a bank of {classes} classes in the state, got one of {state['classes']}; {ANOTHER_MODEL}"
            )
        check_bank(self.bank._asdict(), state["bank"], classes=classes)

    def _load(self, state: dict[str, Any]) -> None:
        self.bank = Supports(*(state["bank"][name].to(own) for name, own in self.bank._asdict().items()))
