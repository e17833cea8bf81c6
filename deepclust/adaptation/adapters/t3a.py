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
from torch import Tensor, nn

from deepclust.adaptation.adapters.tent import entropy
from deepclust.adaptation.bank import check_bank, class_sums
from deepclust.adaptation.base import Adapter, Predict
from deepclust.adaptation.classifier import Classifier
from deepclust.errors import AdaptationError


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


def step(
    images: Tensor, bank: Supports, *, model: Classifier, filter_k: int | None, predict: Predict
) -> tuple[Tensor, Supports]:
    """Remember a batch, and predict it with the bank `before` or `after` that.

    Returns:
        Logits (B, C), and the new bank.
    """
    features_BD, logits_BC = model.outputs(images)
    batch = supports(features_BD, logits_BC.argmax(dim=1), logits_BC)
    after = keep(Supports(*(torch.cat(pair) for pair in zip(bank, batch, strict=True))), filter_k=filter_k)
    prototypes_CD = prototypes(after if predict == "after" else bank, logits_BC.shape[1])
    return features_BD @ prototypes_CD.T, after


def configure_model(model: Classifier) -> Classifier:
    """Eval mode, without gradients. In place."""
    return model.eval().requires_grad_(False)


def check_model(model: Classifier) -> None:
    """Raises AdaptationError if the model has no linear head, whose rows the bank begins with."""
    model.check_head()


class T3A(Adapter):
    """Predicts by prototypes of the confident features seen so far.

    With `filter_k` the bank holds at most `filter_k` members a class, so neither memory nor time grow along a stream.

    Args:
        model: The source model; copied.
        filter_k: Members kept per pseudo-class; None keeps all. The paper chooses among 1, 5, 20, 50, 100 and all.
        episodic: Forget everything before each batch.
        predict: Whether a batch is predicted with the bank `before` or `after` it was added.

    Attributes:
        bank: The members; starts with the head's weight rows, one for each class.

    Raises:
        AdaptationError: If an option is out of range, or the model has no linear head.
    """

    name = "t3a"
    bank: Supports

    def __init__(
        self, model: nn.Module, *, filter_k: int | None = 100, episodic: bool = False, predict: Predict = "after"
    ) -> None:
        if filter_k is not None and filter_k < 1:
            raise AdaptationError(f"expected filter_k of at least 1, or None to keep all members; got {filter_k}")
        self.filter_k = filter_k
        super().__init__(model, episodic=episodic, predict=predict)

    def _check_model(self, model: Classifier) -> None:
        check_model(model)

    def _configure(self, model: Classifier) -> Classifier:
        return configure_model(model)

    @torch.no_grad()
    def _start(self) -> None:
        rows_CD = self.model.head.weight
        classes_C = torch.arange(len(rows_CD), device=rows_CD.device)
        self.bank = supports(rows_CD, classes_C, self.model.head(rows_CD))

    @torch.no_grad()
    def _adapt(self, images: Tensor) -> Tensor:
        logits_BC, self.bank = step(images, self.bank, model=self.model, filter_k=self.filter_k, predict=self.predict)
        return logits_BC

    def _state(self) -> dict[str, Any]:
        return {"classes": self.model.head.out_features, "bank": self.bank._asdict()}

    def _check_state(self, state: dict[str, Any]) -> None:
        if state["classes"] != self.model.head.out_features:
            raise AdaptationError(
                f"expected a bank of {self.model.head.out_features} classes in the state, got one of "
                f"{state['classes']}; load it into an adapter of the model it was saved from"
            )
        check_bank(self.bank._asdict(), state["bank"], classes=self.model.head.out_features)

    def _load(self, state: dict[str, Any]) -> None:
        self.bank = Supports(*(state["bank"][name].to(own) for name, own in self.bank._asdict().items()))
