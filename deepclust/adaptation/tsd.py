"""TSD: Feature Alignment and Uniformity for Test Time Adaptation (arXiv 2303.10902, CVPR 2023).

Test-time self-distillation towards prototypes, and local clustering. This is what the paper means; the authors' code
does something else in places, and gaps had to be filled:
- features are normalised to L2 length 1 and compared by cosine; the code normalises by the L1 norm;
- the target of the distillation is the prediction itself; the code takes the softmax of the softmax;
- the consistency filter is applied, and the mean is over the samples that pass it; the code has none;
- the local term is on, pulls towards the neighbours in probabilities and leaves the sample itself out; in the code its
  weight is 0, its sign pushes apart, it compares logits with probabilities, and a sample is its own neighbour;
- `filter_k=None` keeps all members; in the code -1 drops the least confident of each class at every step;
- `reset()` brings back model, optimiser and bank; the code ignores its options for that;
- a class without members has no prototype: it is left out of q, and the target renormalised over the others;
- as in the code, BatchNorm uses batch statistics, so part of the gain is that of `bn`: report it beside. Unlike there,
  dropout stays off.

Shapes: B images, C classes, D features, M members of the bank, N neighbours, P classes that have members.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.adaptation.base import Learner, Predict, check_shapes, descend, learn_only
from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.normalisation import check_batch_statistics, check_trained_statistics, use_batch_statistics
from deepclust.adaptation.parameters import Parameters, select_parameters
from deepclust.errors import AdaptationError


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
    """Append a batch to the bank, then keep the `filter_k` lowest entropies of each pseudo-class (step 1).

    Of equal entropies the older member stays. `filter_k=None` keeps all: memory and time then grow along the stream.

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
    kept = order[rank < filter_k].sort().values
    return Bank(*(column[kept] for column in joined)), rows_M[kept]


def prototypes(bank: Bank) -> tuple[Tensor, Tensor]:
    """Sums of the members' unit features per pseudo-class (step 2).

    Returns:
        Prototypes (P, D) of the classes that have members, and those classes (P,), ascending.
    """
    belongs_MC = F.one_hot(bank.labels, bank.scores.shape[1])
    classes_P = belongs_MC.sum(dim=0).nonzero().squeeze(1)
    # A product rather than index_add, whose order of summation is not fixed on a GPU.
    return belongs_MC[:, classes_P].to(bank.features).T @ F.normalize(bank.features, dim=1), classes_P


def distillation_loss(features_BD: Tensor, scores_BC: Tensor, bank: Bank, *, temperature: float) -> Tensor:
    """Mean of KL(sg s ‖ q) over the samples with arg max q = arg max s (step 3); 0 where there are none.

    Args:
        features_BD: Features, through which the gradient flows.
        scores_BC: Soft predictions s; constants.
        bank: Members that the prototypes are made of; constants.
        temperature: τ of q = softmax(cos(z, c) / τ).
    """
    prototypes_PD, classes_P = prototypes(bank)
    cosines_BP = F.normalize(features_BD, dim=1) @ F.normalize(prototypes_PD, dim=1).T
    log_q_BP = (cosines_BP / temperature).log_softmax(dim=1)
    target_BP = scores_BC.detach()[:, classes_P]
    target_BP = target_BP / target_BP.sum(dim=1, keepdim=True)
    divergence_B = (torch.xlogy(target_BP, target_BP) - target_BP * log_q_BP).sum(dim=1)
    agrees_B = classes_P[log_q_BP.argmax(dim=1)] == scores_BC.argmax(dim=1)
    return divergence_B[agrees_B].sum() / agrees_B.sum().clamp(min=1)


def local_loss(features_BD: Tensor, scores_BC: Tensor, bank: Bank, rows_M: Tensor, *, neighbours: int) -> Tensor:
    """Mean over samples and their nearest members of sg cos(z_i, z_j) · ‖s_i − sg s_j‖² (step 4).

    Args:
        features_BD: Features; constants, they only choose and weigh the neighbours.
        scores_BC: Soft predictions, through which the gradient flows.
        bank: Members; constants.
        rows_M: Each member's row in the batch, so that no sample is its own neighbour; -1 for older ones.
        neighbours: How many nearest members count; fewer where the bank is smaller.
    """
    cosines_BM = F.normalize(features_BD.detach(), dim=1) @ F.normalize(bank.features, dim=1).T
    itself_BM = rows_M == torch.arange(len(features_BD), device=rows_M.device).unsqueeze(1)
    cosines_BM = cosines_BM.masked_fill(itself_BM, -torch.inf)
    nearest_BN, index_BN = cosines_BM.topk(min(neighbours, len(rows_M)), dim=1)
    other_BN = nearest_BN > -torch.inf
    distances_BN = (scores_BC.unsqueeze(1) - bank.scores[index_BN]).square().sum(dim=2)
    pulls_BN = nearest_BN.masked_fill(~other_BN, 0) * distances_BN
    return (pulls_BN.sum(dim=1) / other_BN.sum(dim=1).clamp(min=1)).mean()


def step(
    images: Tensor,
    bank: Bank,
    *,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    filter_k: int | None,
    neighbours: int,
    local_weight: float,
    temperature: float,
) -> tuple[Tensor, Bank]:
    """Predict a batch, remember it, and take one step on its loss. Changes the model through the optimiser.

    Returns:
        Logits (B, C) from before the step, and the new bank.

    Raises:
        AdaptationError: If the loss is not finite; model, optimiser and bank are then as before.
    """
    with torch.enable_grad():
        features_BD, logits_BC = model.outputs(images)
        scores_BC = logits_BC.softmax(dim=1)
        bank, rows_M = remember(bank, members(features_BD.detach(), logits_BC.detach()), filter_k=filter_k)
        loss = distillation_loss(features_BD, scores_BC, bank, temperature=temperature)
        if local_weight:
            loss = loss + local_weight * local_loss(features_BD, scores_BC, bank, rows_M, neighbours=neighbours)
        descend(loss, optimizer, name="tsd")
    return logits_BC.detach(), bank


def collect_params(model: Classifier, parameters: Parameters) -> list[nn.Parameter]:
    """The parameters that learn. Raises: AdaptationError, if there are none."""
    return list(select_parameters(model, parameters).values())


def configure_model(model: Classifier, parameters: Parameters) -> Classifier:
    """Batch statistics in BatchNorm, eval mode elsewhere, gradients for the chosen parameters alone. In place."""
    use_batch_statistics(model)
    return learn_only(model, parameters)


def check_model(model: Classifier, parameters: Parameters, *, local_weight: float) -> None:
    """Check that the model has what TSD adapts.

    Raises:
        AdaptationError: If the chosen parameters do not exist, no gradient reaches them, or BatchNorm never saw data.
    """
    model.check_head()
    collect_params(model, parameters)
    if parameters == "all" and len(list(model.parameters())) == len(list(model.head_parameters())):
        raise AdaptationError("tsd adapts the features, and this featurizer has no parameters; use the source adapter")
    check_trained_statistics(model)
    if parameters == "head" and not local_weight:
        raise AdaptationError(
            "parameters head with local_weight 0: no gradient reaches the head; raise local_weight, or adapt the body"
        )


class TSD(Learner):
    """Aligns features with the prototypes and the neighbours of confident samples seen so far.

    With `filter_k` the bank holds at most `filter_k` members a class, so neither memory nor time grow along a stream.

    Args:
        model: The source model; copied.
        rate: Adam's rate; the paper's for all parameters is 1e-4, for `affine` alone 1e-3 is usual.
        parameters: Which parameters learn: `all`, `affine`, `body` or `head`.
        filter_k: Members kept per pseudo-class; None keeps all, and memory grows with every image.
        steps: Gradient steps a batch.
        episodic: Forget everything before each batch.
        predict: Whether a batch's prediction is the model's `before` its first or `after` its last step.
        neighbours: Members that the local term pulls towards.
        local_weight: λ of the local term.
        temperature: τ of the prototypes' prediction.

    Attributes:
        bank: The support bank; starts with the head's weight rows and their own predictions.

    Raises:
        AdaptationError: If an option is out of range, or the model has nothing that TSD could adapt.
    """

    name = "tsd"
    bank: Bank

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float = 1e-4,
        parameters: Parameters = "all",
        filter_k: int | None = 100,
        neighbours: int = 3,
        local_weight: float = 0.1,
        temperature: float = 1.0,
        steps: int = 1,
        episodic: bool = False,
        predict: Predict = "before",
    ) -> None:
        if filter_k is not None and filter_k < 1:
            raise AdaptationError(f"expected filter_k of at least 1, or None to keep all members; got {filter_k}")
        if temperature <= 0 or neighbours < 1 or local_weight < 0:
            raise AdaptationError(
                "expected a temperature above 0, neighbours of at least 1 and local_weight of at least 0; got "
                f"temperature {temperature}, neighbours {neighbours}, local_weight {local_weight}"
            )
        self.filter_k, self.neighbours = filter_k, neighbours
        self.local_weight, self.temperature = local_weight, temperature
        super().__init__(model, rate=rate, parameters=parameters, steps=steps, episodic=episodic, predict=predict)

    def _check_model(self, model: Classifier) -> None:
        check_model(model, self.parameters, local_weight=self.local_weight)

    def _check_batch(self, images: Tensor) -> None:
        check_batch_statistics(images, self.model)

    def _configure(self, model: Classifier) -> Classifier:
        return configure_model(model, self.parameters)

    def _start(self) -> None:
        super()._start()
        with torch.no_grad():
            rows_CD = self.model.head.weight.detach().clone()
            self.bank = members(rows_CD, self.model.head(rows_CD))

    def _begin(self, images: Tensor) -> None:
        self._before = self.bank

    def _step(self, images: Tensor) -> Tensor:
        # Every step starts from the bank before the batch: its members are then the batch's newest features, once.
        logits_BC, self.bank = step(
            images,
            self._before,
            model=self.model,
            optimizer=self._optimizer,
            filter_k=self.filter_k,
            neighbours=self.neighbours,
            local_weight=self.local_weight,
            temperature=self.temperature,
        )
        return logits_BC

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"bank": self.bank._asdict()}

    def _check_state(self, state: dict[str, Any]) -> None:
        super()._check_state(state)
        check_shapes(
            {name: value[:0] for name, value in self.bank._asdict().items()},
            {name: value[:0] for name, value in state["bank"].items()},
        )

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.bank = Bank(**state["bank"])
