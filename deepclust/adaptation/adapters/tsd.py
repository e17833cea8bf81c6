"""TSD: Feature Alignment and Uniformity for Test Time Adaptation (arXiv 2303.10902, CVPR 2023).

Test-time self-distillation towards prototypes, and local clustering. The default is what the paper means. The authors'
code (SakurajimaMaiii/TSD) deviates from it in places: each is a field of `Deviations`, and `compat="original"` sets
them all (`ORIGINAL`), without the local term, which is never on there. That code ignores `steps` and `episodic`, too.

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
from deepclust.adaptation.base import Learner, LearnerConfig
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
    """What the paper and its authors' code do differently; the defaults are the paper's. params.yaml has `compat`."""

    normalise: Norm = "l2"
    """The norm of unit features: `l2`, for cosines, or `l1` (the code), which makes an almost flat softmax."""
    target: Target = "prediction"
    """What the prototypes' prediction learns: the `prediction`, or its softmax once more (the code)."""
    divergence: Divergence = "forward"
    """Kullback–Leibler divergence: `forward` of target and prototypes' prediction, or `reverse` (the code)."""
    consistency_filter: Flag = True
    """Learn only from samples on which head and prototypes agree; the code learns from all."""
    empty_classes: EmptyClasses = "left_out"
    """A class without members is `left_out` of the prototypes' prediction, or its prototype is `zero` (the code)."""
    local_compares: Compares = "probabilities"
    """What the local term compares with the neighbours' probabilities: `probabilities` or `logits` (the code)."""
    local_itself: Flag = False
    """A sample is its own nearest neighbour, as in the code."""
    local_repels: Flag = False
    """The local term pushes neighbours apart, as in the code."""
    drop_last: Flag = False
    """In place of `filter_k`, each step drops the least certain member of each pseudo-class, and memory grows: what the
    code does with filter_k -1, which was meant to keep all."""
    train_mode: Flag = False
    """Dropout and stochastic depth are on, in predictions too, as in the code. Their random numbers depend on `seed`
    and the number of batches before, and leave torch's global generators alone; they differ between kinds of devices.
    """
    seed: Natural = 0
    """Of train_mode's random numbers."""

    def _check(self) -> None:
        if self.seed and not self.train_mode:
            raise ValueError(f"seed {self.seed} without effect: nothing is random but in train_mode; leave it out")


PAPER = Deviations()
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
    features_BD: Tensor, scores_BC: Tensor, bank: Bank, *, temperature: float, its: Deviations = PAPER
) -> Tensor:
    """Mean of KL(sg s ‖ q) over the samples with arg max q = arg max s (step 3); 0 where there are none.

    Args:
        features_BD: Features, through which the gradient flows.
        scores_BC: Soft predictions s; constants.
        bank: Members that the prototypes are made of; constants.
        temperature: τ of q = softmax(cos(z, c) / τ).
        its: What is done otherwise; with normalise `l1` the products of z and c are no cosines.

    Raises:
        AdaptationError: If no class has a prototype.
    """
    order = ORDER[its.normalise]
    prototypes_PD, classes_P = prototypes(bank, empty_classes=its.empty_classes)
    cosines_BP = F.normalize(features_BD, p=order, dim=1) @ F.normalize(prototypes_PD, p=order, dim=1).T
    log_q_BP = (cosines_BP / temperature).log_softmax(dim=1)
    target_BC = scores_BC.detach()
    if its.target == "softmax_of_prediction":
        target_BC = target_BC.softmax(dim=1)
    # Probabilities that underflow to 0 count as the smallest number: a logarithm of 0 would end the stream.
    tiny = torch.finfo(target_BC.dtype).tiny
    target_BP = target_BC[:, classes_P]
    target_BP = target_BP / target_BP.sum(dim=1, keepdim=True).clamp(min=tiny)
    if its.divergence == "forward":
        divergence_B = (torch.xlogy(target_BP, target_BP) - target_BP * log_q_BP).sum(dim=1)
    else:
        divergence_B = (log_q_BP.exp() * (log_q_BP - target_BP.clamp(min=tiny).log())).sum(dim=1)
    if not its.consistency_filter:
        return divergence_B.mean()
    agrees_B = classes_P[log_q_BP.argmax(dim=1)] == scores_BC.argmax(dim=1)
    return divergence_B[agrees_B].sum() / agrees_B.sum().clamp(min=1)


def local_loss(
    features_BD: Tensor, values_BC: Tensor, bank: Bank, rows_M: Tensor, *, neighbours: int, its: Deviations = PAPER
) -> Tensor:
    """Mean over samples and their nearest members of sg cos(z_i, z_j) · ‖s_i − sg s_j‖² (step 4).

    Args:
        features_BD: Features; constants, they only choose and weigh the neighbours.
        values_BC: Soft predictions s_i, or logits in their place, through which the gradient flows.
        bank: Members; constants.
        rows_M: Each member's row in the batch, so that no sample is its own neighbour; -1 for older ones.
        neighbours: How many nearest members count; fewer where the bank is smaller.
        its: What is done otherwise; with normalise `l1` the products of z_i and z_j are no cosines.
    """
    order = ORDER[its.normalise]
    cosines_BM = F.normalize(features_BD.detach(), p=order, dim=1) @ F.normalize(bank.features, p=order, dim=1).T
    if not its.local_itself:
        itself_BM = rows_M == torch.arange(len(features_BD), device=rows_M.device).unsqueeze(1)
        cosines_BM = cosines_BM.masked_fill(itself_BM, -torch.inf)
    nearest_BN, index_BN = cosines_BM.topk(min(neighbours, len(rows_M)), dim=1)
    other_BN = nearest_BN > -torch.inf
    distances_BN = (values_BC.unsqueeze(1) - bank.scores[index_BN]).square().sum(dim=2)
    pulls_BN = nearest_BN.masked_fill(~other_BN, 0) * distances_BN
    pull = (pulls_BN.sum(dim=1) / other_BN.sum(dim=1).clamp(min=1)).mean()
    return -pull if its.local_repels else pull


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
        local = ("local_compares", "local_itself", "local_repels")
        idle = [name for name in local if deviations and getattr(deviations, name) != getattr(PAPER, name)]
        if idle and config is not None and config.local_weight == 0:
            raise ConfigError(
                f"{', '.join(idle)} without effect: local_weight is 0, so there is no local term; raise local_weight, "
                "or leave these out"
            )
        self.deviations = ORIGINAL if compat else deviations or PAPER
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
        its, self._before = self.deviations, self.bank
        with seeding.seeded(self.name, its.seed, self.batches) if its.train_mode else nullcontext():
            logits_BC = super()._adapt(images)
        self.batches += 1
        return logits_BC

    def _loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        config, its = self.config, self.deviations
        features_BD, logits_BC = self.model.outputs(images)
        scores_BC = logits_BC.softmax(dim=1)
        # Every step starts from the bank before the batch: its members are then the batch's newest features, once.
        batch = members(features_BD.detach(), logits_BC.detach())
        self.bank, rows_M = remember(self._before, batch, filter_k=DROP_LAST if its.drop_last else config.filter_k)
        loss = distillation_loss(features_BD, scores_BC, self.bank, temperature=config.temperature, its=its)
        if config.weight:
            values_BC = logits_BC if its.local_compares == "logits" else scores_BC
            local = local_loss(features_BD, values_BC, self.bank, rows_M, neighbours=config.neighbours, its=its)
            loss = loss + config.weight * local
        return logits_BC, loss

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"bank": self.bank._asdict(), "batches": self.batches}

    def _check_state(self, state: dict[str, Any]) -> None:
        super()._check_state(state)
        check_bank(self.bank._asdict(), state["bank"], classes=self.bank.scores.shape[1])

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.bank = Bank(*(state["bank"][name].to(own) for name, own in self.bank._asdict().items()))
        self.batches = state["batches"]
