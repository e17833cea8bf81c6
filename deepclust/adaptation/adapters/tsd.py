"""TSD: Feature Alignment and Uniformity for Test Time Adaptation (arXiv 2303.10902, CVPR 2023).

Test-time self-distillation towards prototypes, and local clustering. The default is what the paper means. The authors'
code (SakurajimaMaiii/TSD) deviates from it in places: each can be chosen by `Deviations` or an option, and
`compat="original"` sets them all.

| deviation             | default, the paper's                | the code's (`ORIGINAL`)                               |
|-----------------------|-------------------------------------|-------------------------------------------------------|
| `normalise`           | `l2`: cosines                       | `l1`: lengths by the L1 norm, an almost flat softmax  |
| `target`              | `prediction`                        | `softmax_of_prediction`: softmax of the softmax       |
| `divergence`          | `forward`: KL(target ‖ prototypes') | `reverse`: KL(prototypes' ‖ target)                   |
| `consistency_filter`  | True; mean over those that pass it  | False; mean over the batch                            |
| `empty_classes`       | `left_out`, target renormalised     | `zero`: a class without members keeps its exp(0)      |
| `local_compares`      | `probabilities`                     | `logits` of the sample with neighbours' probabilities |
| `local_itself`        | False                               | True: a sample is its own nearest neighbour           |
| `local_repels`        | False: neighbours pull              | True: neighbours push apart                           |
| `train_mode`          | False: dropout off                  | True: dropout on; `seed` says which random numbers    |
| `drop_last`           | False: `filter_k` members stay      | its `filter_k` -1, meant to keep all: one of each     |
|                       |                                     | class goes at every step; `ORIGINAL` leaves it off    |
| option `local_weight` | .1                                  | 0, so `local_compares` to `local_repels` have no use  |
| `steps`, `episodic`   | honoured                            | ignored: errors beside `compat`                       |

The prototypes are sums of features of L2 length 1 under either norm, as in the code. There is no option for this: the
code never resets; here `reset()` brings back model, optimiser and bank. BatchNorm uses batch statistics in both, so
part of the gain is that of `bn`: report it beside; the code also moves running statistics, which nothing then reads.
`affine` is more than the code's BatchNorm2d, and members of equal entropy stay by age, where the code leaves it open.

Shapes: B images, C classes, D features, M members of the bank, N neighbours, P classes that have a prototype.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import config as configs
from deepclust import seeding
from deepclust.adaptation.bank import DROP_LAST, Bank, EmptyClasses, check_bank, members, prototypes, remember
from deepclust.adaptation.base import Learner, LearnerConfig, descend
from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.parameters import Parameters, select_parameters
from deepclust.config import Count, Flag, Natural, NotNegative, Positive, config
from deepclust.errors import AdaptationError, ConfigError

Norm = Literal["l2", "l1"]
Target = Literal["prediction", "softmax_of_prediction"]
Divergence = Literal["forward", "reverse"]
Compares = Literal["probabilities", "logits"]

ORDER: dict[Norm, float] = {"l2": 2.0, "l1": 1.0}


@config
class Config(LearnerConfig):
    """TSD's options."""

    compat: Literal["original"] | None = None
    """`original` computes what the authors' code computes: `ORIGINAL`, and no local term."""
    rate: Positive = 1e-4
    """Adam's rate; the paper's for all parameters is 1e-4, for `affine` alone 1e-3 is usual."""
    parameters: Parameters = "all"
    """Which parameters learn: `all`, `affine` (of the normalisations), `body` (all but the head's) or `head`."""
    filter_k: Count | None = 100
    """Members kept per pseudo-class; None keeps all, and memory grows with every image."""
    neighbours: Count = 3
    """Members that the local term pulls towards."""
    local_weight: NotNegative | None = None
    """λ of the local term; None is the paper's .1, or what compat means."""
    temperature: Positive = 1.0
    """τ of the prototypes' prediction."""

    @property
    def weight(self) -> float:
        """λ of the local term."""
        paper = 0.1 if self.compat is None else 0.0
        return paper if self.local_weight is None else self.local_weight

    def _check(self) -> None:
        its = {"local_weight": 0, "steps": 1, "episodic": False, "predict": "before"}
        for name, value in its.items() if self.compat else ():
            given = getattr(self, name)
            if given not in (None, value):
                remedy = "make it null" if name == "local_weight" else f"make it {value}"
                raise ValueError(f"compat {self.compat!r} means {name} {value}, got {given}; {remedy}, or compat null")
        if self.compat and self.filter_k is None:
            raise ValueError(f"compat {self.compat!r} can not keep all members; give filter_k, or make compat null")
        if self.parameters == "head" and not self.weight:
            raise ValueError(
                "without the local term no gradient reaches parameters head; choose other parameters, or compat null "
                "and a local_weight above 0"
            )


@config
class Deviations(configs.Config):
    """What paper and code do differently, each as the table above has it; the defaults are the paper's.

    They are for the library alone: params.yaml has `compat`.
    """

    normalise: Norm = "l2"
    """The norm of unit features: `l2` or `l1`."""
    target: Target = "prediction"
    """What the prototypes' prediction learns: the `prediction`, or the `softmax_of_prediction`."""
    divergence: Divergence = "forward"
    """`forward` or `reverse` Kullback–Leibler divergence."""
    consistency_filter: Flag = True
    """Learn only from samples on which head and prototypes agree."""
    empty_classes: EmptyClasses = "left_out"
    """A class without members is `left_out` of the prototypes' prediction, or `zero` is its prototype."""
    local_compares: Compares = "probabilities"
    """What the local term compares with the neighbours' probabilities: `probabilities` or `logits`."""
    local_itself: Flag = False
    """A sample is its own neighbour."""
    local_repels: Flag = False
    """The local term pushes neighbours apart."""
    drop_last: Flag = False
    """In place of `filter_k`, each step drops the least certain member of each pseudo-class; memory grows."""
    train_mode: Flag = False
    """Dropout and stochastic depth are on, in predictions too. Their random numbers depend on `seed` and on how many
    batches came before, and leave torch's global generators as they were; they differ between kinds of devices."""
    seed: Natural = 0
    """Of train_mode's random numbers."""


ORIGINAL = Deviations(
    normalise="l1",
    target="softmax_of_prediction",
    divergence="reverse",
    consistency_filter=False,
    empty_classes="zero",
    local_compares="logits",
    local_itself=True,
    local_repels=True,
    train_mode=True,
)


def distillation_loss(
    features_BD: Tensor,
    scores_BC: Tensor,
    bank: Bank,
    *,
    temperature: float,
    normalise: Norm = "l2",
    target: Target = "prediction",
    divergence: Divergence = "forward",
    consistency_filter: bool = True,
    empty_classes: EmptyClasses = "left_out",
) -> Tensor:
    """Mean of KL(sg s ‖ q) over the samples with arg max q = arg max s (step 3); 0 where there are none.

    Args:
        features_BD: Features, through which the gradient flows.
        scores_BC: Soft predictions s; constants.
        bank: Members that the prototypes are made of; constants.
        temperature: τ of q = softmax(cos(z, c) / τ).
        normalise: The norm that makes z and c unit vectors; with `l1` their product is no cosine.
        target: The prediction s itself, or its softmax.
        divergence: `forward` is KL(s ‖ q), `reverse` KL(q ‖ s).
        consistency_filter: False takes the mean over all samples.
        empty_classes: Whether q has a class without members.

    Raises:
        AdaptationError: If no class has a prototype.
    """
    order = ORDER[normalise]
    prototypes_PD, classes_P = prototypes(bank, empty_classes=empty_classes)
    cosines_BP = F.normalize(features_BD, p=order, dim=1) @ F.normalize(prototypes_PD, p=order, dim=1).T
    log_q_BP = (cosines_BP / temperature).log_softmax(dim=1)
    target_BC = scores_BC.detach()
    if target == "softmax_of_prediction":
        target_BC = target_BC.softmax(dim=1)
    # Probabilities that underflow to 0 count as the smallest number: a logarithm of 0 would end the stream.
    tiny = torch.finfo(target_BC.dtype).tiny
    target_BP = target_BC[:, classes_P]
    target_BP = target_BP / target_BP.sum(dim=1, keepdim=True).clamp(min=tiny)
    if divergence == "forward":
        divergence_B = (torch.xlogy(target_BP, target_BP) - target_BP * log_q_BP).sum(dim=1)
    else:
        divergence_B = (log_q_BP.exp() * (log_q_BP - target_BP.clamp(min=tiny).log())).sum(dim=1)
    if not consistency_filter:
        return divergence_B.mean()
    agrees_B = classes_P[log_q_BP.argmax(dim=1)] == scores_BC.argmax(dim=1)
    return divergence_B[agrees_B].sum() / agrees_B.sum().clamp(min=1)


def local_loss(
    features_BD: Tensor,
    values_BC: Tensor,
    bank: Bank,
    rows_M: Tensor,
    *,
    neighbours: int,
    normalise: Norm = "l2",
    itself: bool = False,
    repels: bool = False,
) -> Tensor:
    """Mean over samples and their nearest members of sg cos(z_i, z_j) · ‖s_i − sg s_j‖² (step 4).

    Args:
        features_BD: Features; constants, they only choose and weigh the neighbours.
        values_BC: Soft predictions s_i, or logits in their place, through which the gradient flows.
        bank: Members; constants.
        rows_M: Each member's row in the batch, so that no sample is its own neighbour; -1 for older ones.
        neighbours: How many nearest members count; fewer where the bank is smaller.
        normalise: The norm that makes z_i and z_j unit vectors; with `l1` their product is no cosine.
        itself: A sample that is in the bank counts among its own neighbours.
        repels: The loss is negative, and falls as predictions move away from the neighbours'.
    """
    order = ORDER[normalise]
    cosines_BM = F.normalize(features_BD.detach(), p=order, dim=1) @ F.normalize(bank.features, p=order, dim=1).T
    if not itself:
        itself_BM = rows_M == torch.arange(len(features_BD), device=rows_M.device).unsqueeze(1)
        cosines_BM = cosines_BM.masked_fill(itself_BM, -torch.inf)
    nearest_BN, index_BN = cosines_BM.topk(min(neighbours, len(rows_M)), dim=1)
    other_BN = nearest_BN > -torch.inf
    distances_BN = (values_BC.unsqueeze(1) - bank.scores[index_BN]).square().sum(dim=2)
    pulls_BN = nearest_BN.masked_fill(~other_BN, 0) * distances_BN
    pull = (pulls_BN.sum(dim=1) / other_BN.sum(dim=1).clamp(min=1)).mean()
    return -pull if repels else pull


def step(
    images: Tensor,
    bank: Bank,
    *,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    config: Config,
    deviations: Deviations,
) -> tuple[Tensor, Bank]:
    """Predict a batch, remember it, and take one step on its loss. Changes the model through the optimiser.

    Returns:
        Logits (B, C) from before the step, and the new bank.

    Raises:
        AdaptationError: If loss, gradient or logits are not finite; model, optimiser and bank are then as before.
    """
    filter_k = DROP_LAST if deviations.drop_last else config.filter_k
    with torch.enable_grad():
        features_BD, logits_BC = model.outputs(images)
        scores_BC = logits_BC.softmax(dim=1)
        bank, rows_M = remember(bank, members(features_BD.detach(), logits_BC.detach()), filter_k=filter_k)
        loss = distillation_loss(
            features_BD,
            scores_BC,
            bank,
            temperature=config.temperature,
            normalise=deviations.normalise,
            target=deviations.target,
            divergence=deviations.divergence,
            consistency_filter=deviations.consistency_filter,
            empty_classes=deviations.empty_classes,
        )
        if config.weight:
            loss = loss + config.weight * local_loss(
                features_BD,
                logits_BC if deviations.local_compares == "logits" else scores_BC,
                bank,
                rows_M,
                neighbours=config.neighbours,
                normalise=deviations.normalise,
                itself=deviations.local_itself,
                repels=deviations.local_repels,
            )
        descend(loss, logits_BC, optimizer, name="tsd")
    return logits_BC.detach(), bank


class TSD(Learner):
    """Aligns features with the prototypes and the neighbours of confident samples seen so far.

    With `filter_k` the bank holds at most `filter_k` members a class, so neither memory nor time grow along a stream.

    Args:
        model: The source model; copied.
        config: The options; None takes the defaults.
        deviations: What to do as the authors' code does; None is the paper, or what compat means.

    Attributes:
        bank: The support bank; starts with the head's weight rows and their own predictions.
        batches: Batches since the adapter was made or reset.
        deviations: Those in force.

    Raises:
        AdaptationError: If the model has nothing that TSD could adapt.
        ConfigError: If deviations are given beside compat.
    """

    name = "tsd"
    config_class = Config
    config: Config
    bank: Bank
    batches: int

    def __init__(self, model: nn.Module, config: Config | None = None, *, deviations: Deviations | None = None) -> None:
        compat = config is not None and config.compat
        if compat and deviations is not None:
            raise ConfigError(f"compat {compat!r} says all deviations; leave out one of the two")
        self.deviations = ORIGINAL if compat else deviations or Deviations()
        super().__init__(model, config)

    def _check_model(self, model: Classifier) -> None:
        model.check_head()
        learning = select_parameters(model, self.config.parameters)
        if self.config.parameters == "all" and len(learning) == len(list(model.head_parameters())):
            raise AdaptationError(
                "tsd adapts the features, and this featurizer has no parameters; use the source adapter"
            )
        super()._check_model(model)

    def _configure(self, model: Classifier) -> Classifier:
        super()._configure(model)
        return model.train() if self.deviations.train_mode else model

    def _start(self) -> None:
        super()._start()
        self.batches = 0
        with torch.no_grad():
            rows_CD = self.model.head.weight.detach().clone()
            self.bank = members(rows_CD, self.model.head(rows_CD))

    def _adapt(self, images: Tensor) -> Tensor:
        # Dropout takes no generator: the global one is lent a seed of ours for the batch, and given back.
        its = self.deviations
        with seeding.seeded(self.name, its.seed, self.batches) if its.train_mode else nullcontext():
            logits_BC = super()._adapt(images)
        self.batches += 1
        return logits_BC

    def _begin(self, images: Tensor) -> None:
        self._before = self.bank

    def _step(self, images: Tensor) -> Tensor:
        # Every step starts from the bank before the batch: its members are then the batch's newest features, once.
        logits_BC, self.bank = step(
            images,
            self._before,
            model=self.model,
            optimizer=self._optimizer,
            config=self.config,
            deviations=self.deviations,
        )
        return logits_BC

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"bank": self.bank._asdict(), "batches": self.batches}

    def _check_state(self, state: dict[str, Any]) -> None:
        super()._check_state(state)
        check_bank(self.bank._asdict(), state["bank"], classes=self.bank.scores.shape[1])

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.bank = Bank(*(state["bank"][name].to(own) for name, own in self.bank._asdict().items()))
        self.batches = state["batches"]
