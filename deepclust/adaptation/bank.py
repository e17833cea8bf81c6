"""TSD's support bank and its prototypes (arXiv 2303.10902): the most certain samples of each pseudo-class so far.

Shapes: B images, C classes, D features, M members of the bank, P classes that have a prototype.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.adaptation.base import ANOTHER_MODEL, ANOTHER_VERSION
from deepclust.errors import AdaptationError

EmptyClasses = Literal["left_out", "zero"]

DROP_LAST = -1
"""The `filter_k` that drops the least certain member of each pseudo-class at every step."""


class Bank(NamedTuple):
    """The support bank, oldest member first.

    Attributes:
        features: (M, D), as the featurizer gave them.
        scores: (M, C) soft predictions.
        labels: (M,) their arg max, the pseudo-class.
        entropies: (M,) of the scores.
    """

    features: Tensor
    scores: Tensor
    labels: Tensor
    entropies: Tensor


def members(features_BD: Tensor, logits_BC: Tensor) -> Bank:
    """Samples as members of a bank, in their order."""
    log_scores_BC = logits_BC.log_softmax(dim=1)
    scores_BC = log_scores_BC.exp()
    return Bank(features_BD, scores_BC, logits_BC.argmax(dim=1), -(scores_BC * log_scores_BC).sum(dim=1))


def remember(bank: Bank, batch: Bank, *, filter_k: int | None) -> tuple[Bank, Tensor]:
    """Append a batch to the bank, then keep the `filter_k` lowest entropies of each pseudo-class.

    Of equal entropies the older member stays. `filter_k=None` keeps all, and `DROP_LAST` all but one of each class:
    memory and time then grow along the stream.

    Returns:
        The new bank, and for each of its members (M,) its row in the batch, -1 for older ones.
    """
    joined = Bank(*(torch.cat(pair) for pair in zip(bank, batch, strict=True)))
    older = joined.labels.new_full((len(bank.labels),), -1)
    rows_M = torch.cat([older, torch.arange(len(batch.labels), device=older.device)])
    if filter_k is None:
        return joined, rows_M
    order = joined.entropies.argsort(stable=True)
    order = order[joined.labels[order].argsort(stable=True)]
    counts_C = torch.bincount(joined.labels, minlength=joined.scores.shape[1])
    first_C = counts_C.cumsum(0) - counts_C
    rank = torch.arange(len(order), device=order.device) - first_C[joined.labels[order]]
    limit = counts_C[joined.labels[order]] - 1 if filter_k == DROP_LAST else filter_k
    kept = order[rank < limit].sort().values
    return Bank(*(column[kept] for column in joined)), rows_M[kept]


def prototypes(bank: Bank, *, empty_classes: EmptyClasses = "left_out") -> tuple[Tensor, Tensor]:
    """Sums of the members' unit features (L2) per pseudo-class. One without members is `left_out`, or `zero`.

    Returns:
        Prototypes (P, D), and their classes (P,), ascending.

    Raises:
        AdaptationError: If no class has a prototype.
    """
    classes = bank.scores.shape[1]
    classes_P = torch.arange(classes, device=bank.labels.device)
    if empty_classes == "left_out":
        classes_P = torch.bincount(bank.labels, minlength=classes).nonzero().squeeze(1)
    if not len(classes_P):
        raise AdaptationError(
            "expected a bank with members, got an empty one: drop_last drops a class's only member; leave it off, or "
            "set empty_classes to zero"
        )
    return class_sums(F.normalize(bank.features, dim=1), bank.labels, classes)[classes_P], classes_P


def class_sums(features_MD: Tensor, labels_M: Tensor, classes: int) -> Tensor:
    """Sums (C, D) of each class's features, 0 for a class without any; the same at each run, also on a GPU."""
    if features_MD.is_cuda:
        return segment_sums(features_MD, labels_M, classes)
    return features_MD.new_zeros(classes, features_MD.shape[1]).index_add_(0, labels_M, features_MD)


def segment_sums(features_MD: Tensor, labels_M: Tensor, classes: int) -> Tensor:
    """What `class_sums` is on a GPU, where the order in which index_add_ sums is not fixed."""
    order_M = labels_M.argsort(stable=True)
    lengths_C = torch.bincount(labels_M, minlength=classes)
    return torch.segment_reduce(features_MD[order_M], "sum", lengths=lengths_C, axis=0, unsafe=True)


def check_bank(expected: dict[str, Tensor], got: dict[str, Tensor], *, classes: int) -> None:
    """Raises AdaptationError if a state's bank is of other features or classes, or its columns do not fit together."""
    if got.keys() != expected.keys():
        raise AdaptationError(
            f"expected a bank with {', '.join(expected)} in the state, got {', '.join(got)}; {ANOTHER_VERSION}"
        )
    labels = got["labels"]
    length = len(labels) if labels.ndim else 0
    shapes = [tuple(column.shape) for column in got.values()]
    if shapes != [(length, *expected[name].shape[1:]) for name in got]:
        raise AdaptationError(
            f"expected a bank of {expected['features'].shape[1]} features and {classes} classes in the state, got "
            f"columns of shapes {', '.join(map(str, shapes))}; {ANOTHER_MODEL}"
        )
    if length and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise AdaptationError(
            f"expected pseudo-classes below {classes} in the state's bank, got "
            f"{int(labels.min())} to {int(labels.max())}; load the state as it was saved"
        )
