"""TSD: Feature Alignment and Uniformity for Test Time Adaptation (arXiv 2303.10902, CVPR 2023).

Test-time self-distillation towards prototypes, and local clustering. The default is what the paper means. The authors'
code (SakurajimaMaiii/TSD) does something else in places: each is an option here, and `compat="original"` sets them all.

| option                | default, the paper's                | the code's (`ORIGINAL`)                               |
|-----------------------|-------------------------------------|-------------------------------------------------------|
| `normalise`           | `l2`: cosines                       | `l1`: lengths by the L1 norm, an almost flat softmax  |
| `target`              | `prediction`                        | `softmax_of_prediction`: softmax of the softmax       |
| `divergence`          | `forward`: KL(target ‖ prototypes') | `reverse`: KL(prototypes' ‖ target)                   |
| `consistency_filter`  | True; mean over those that pass it  | False; mean over the batch                            |
| `empty_classes`       | `left_out`, target renormalised     | `zero`: a class without members keeps its exp(0)      |
| `local_weight`        | .1                                  | 0: never on; the three below show only where it is    |
| `local_compares`      | `probabilities`                     | `logits` of the sample with neighbours' probabilities |
| `local_itself`        | False                               | True: a sample is its own nearest neighbour           |
| `local_repels`        | False: neighbours pull              | True: neighbours push apart                           |
| `train_mode`          | False: dropout off                  | True: dropout on; `seed` says which random numbers    |
| `filter_k`            | 100, or None for all members        | 100; -1, meant to keep all, drops one of each class   |
| `steps`, `episodic`   | honoured                            | ignored: errors beside `compat`                       |

The prototypes are sums of features of L2 length 1 under either norm, as in the code. There is no option for this: the
code never resets; here `reset()` brings back model, optimiser and bank. BatchNorm uses batch statistics in both, so
part of the gain is that of `bn`: report it beside; the code also moves running statistics, which nothing then reads.
`affine` is more than the code's BatchNorm2d, and members of equal entropy stay by age, where the code leaves it open.

Shapes: B images, C classes, D features, M members of the bank, N neighbours, P classes that have a prototype.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import seeding
from deepclust.adaptation.bank import DROP_LAST, Bank, EmptyClasses, check_bank, members, prototypes, remember
from deepclust.adaptation.base import Learner, Predict, descend, learn_only
from deepclust.adaptation.classifier import Classifier
from deepclust.adaptation.normalisation import check_batch_statistics, check_trained_statistics, use_batch_statistics
from deepclust.adaptation.parameters import Parameters, select_parameters
from deepclust.errors import AdaptationError

Norm = Literal["l2", "l1"]
Target = Literal["prediction", "softmax_of_prediction"]
Divergence = Literal["forward", "reverse"]
Compares = Literal["probabilities", "logits"]
Compat = Literal["original"]

ORDER: dict[Norm, float] = {"l2": 2.0, "l1": 1.0}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What paper and code do differently, each as the table above has it; the defaults are the paper's.

    Raises:
        AdaptationError: If a value is none of an option's.
    """

    normalise: Norm = "l2"
    target: Target = "prediction"
    divergence: Divergence = "forward"
    consistency_filter: bool = True
    empty_classes: EmptyClasses = "left_out"
    local_weight: float = 0.1
    local_compares: Compares = "probabilities"
    local_itself: bool = False
    local_repels: bool = False
    train_mode: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices or type(value) is not type(choices[0]):
                raise AdaptationError(f"expected {name} to be one of {', '.join(map(str, choices))}; got {value!r}")
        if not self.local_weight >= 0:
            raise AdaptationError(f"expected a local_weight of at least 0, got {self.local_weight}")


CHOICES: dict[str, tuple[str | bool, ...]] = {
    "normalise": get_args(Norm),
    "target": get_args(Target),
    "divergence": get_args(Divergence),
    "consistency_filter": (True, False),
    "empty_classes": get_args(EmptyClasses),
    "local_compares": get_args(Compares),
    "local_itself": (True, False),
    "local_repels": (True, False),
    "train_mode": (True, False),
}

ORIGINAL = Variant(
    normalise="l1",
    target="softmax_of_prediction",
    divergence="reverse",
    consistency_filter=False,
    empty_classes="zero",
    local_weight=0.0,
    local_compares="logits",
    local_itself=True,
    local_repels=True,
    train_mode=True,
)


def choose(compat: Compat | None, **given: Any) -> Variant:
    """The variant that compat names or, without it, the paper's with the given options; None is one not given.

    Raises:
        AdaptationError: If an option contradicts compat, has no effect, or is none of those there are.
    """
    if compat is not None and compat not in get_args(Compat):
        raise AdaptationError(f"expected compat to be {' or '.join(get_args(Compat))} or None, got {compat!r}")
    given = {name: value for name, value in given.items() if value is not None}
    if compat is not None:
        check_compat(compat, asdict(ORIGINAL), given)
        return ORIGINAL
    paper, variant = Variant(), replace(Variant(), **given)
    local = ("local_compares", "local_itself", "local_repels")
    idle = [name for name in local if not variant.local_weight and getattr(variant, name) != getattr(paper, name)]
    if idle:
        raise AdaptationError(
            f"{', '.join(idle)} without effect: local_weight is 0, so there is no local term; raise local_weight, or "
            "leave these out"
        )
    return variant


def check_compat(compat: Compat, its: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises AdaptationError if a given option is not as the code of that name has it."""
    for name, value in given.items():
        if value != its[name]:
            raise AdaptationError(
                f"compat {compat!r} means {name} {its[name]}, got {value}; leave out one of the two, and without "
                "compat give each deviation by its own option"
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
    filter_k: int | None,
    neighbours: int,
    temperature: float,
    variant: Variant,
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
        loss = distillation_loss(
            features_BD,
            scores_BC,
            bank,
            temperature=temperature,
            normalise=variant.normalise,
            target=variant.target,
            divergence=variant.divergence,
            consistency_filter=variant.consistency_filter,
            empty_classes=variant.empty_classes,
        )
        if variant.local_weight:
            loss = loss + variant.local_weight * local_loss(
                features_BD,
                logits_BC if variant.local_compares == "logits" else scores_BC,
                bank,
                rows_M,
                neighbours=neighbours,
                normalise=variant.normalise,
                itself=variant.local_itself,
                repels=variant.local_repels,
            )
        descend(loss, optimizer, name="tsd")
    return logits_BC.detach(), bank


def collect_params(model: Classifier, parameters: Parameters) -> list[nn.Parameter]:
    """The parameters that learn. Raises: AdaptationError, if there are none."""
    return list(select_parameters(model, parameters).values())


def configure_model(model: Classifier, parameters: Parameters, *, train_mode: bool = False) -> Classifier:
    """Batch statistics in BatchNorm, eval or train mode elsewhere, gradients for the chosen parameters. In place."""
    use_batch_statistics(model)
    if train_mode:
        model.train()
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
    Options that are None are as the paper has them, or as compat says.

    Args:
        model: The source model; copied.
        rate: Adam's rate; the paper's for all parameters is 1e-4, for `affine` alone 1e-3 is usual.
        parameters: Which parameters learn: `all`, `affine`, `body` or `head`.
        filter_k: Members kept per pseudo-class; None keeps all, and memory grows with every image. -1 is the code's: it
            drops the least certain of each pseudo-class at every step, and memory grows too.
        steps: Gradient steps a batch.
        episodic: Forget everything before each batch.
        predict: Whether a batch's prediction is the model's `before` its first or `after` its last step.
        neighbours: Members that the local term pulls towards.
        local_weight: λ of the local term; .1 where None and without compat.
        temperature: τ of the prototypes' prediction.
        compat: `original` computes what the authors' code computes: all the options below, and local_weight, at once.
        normalise: The norm of unit features: `l2` or `l1`.
        target: What the prototypes' prediction learns: the `prediction`, or the `softmax_of_prediction`.
        divergence: `forward` or `reverse` Kullback–Leibler divergence.
        consistency_filter: Learn only from samples on which head and prototypes agree.
        empty_classes: A class without members is `left_out` of the prototypes' prediction, or `zero` is its prototype.
        local_compares: What the local term compares with the neighbours' probabilities: `probabilities` or `logits`.
        local_itself: A sample is its own neighbour.
        local_repels: The local term pushes neighbours apart.
        train_mode: Dropout and stochastic depth are on, in predictions too. Their random numbers depend on `seed` and
            on how many batches came before, and leave torch's global generators as they were; they are the same on one
            kind of device alone.
        seed: Seed of train_mode's random numbers; 0 where None.

    Attributes:
        bank: The support bank; starts with the head's weight rows and their own predictions.
        batches: Batches since the adapter was made or reset.
        variant: What compat and the options between paper and code came to.

    Raises:
        AdaptationError: If an option is out of range, contradicts compat or has no effect, or the model has nothing
            that TSD could adapt.
    """

    name = "tsd"
    bank: Bank
    batches: int

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float = 1e-4,
        parameters: Parameters = "all",
        filter_k: int | None = 100,
        neighbours: int = 3,
        local_weight: float | None = None,
        temperature: float = 1.0,
        steps: int = 1,
        episodic: bool = False,
        predict: Predict = "before",
        compat: Compat | None = None,
        normalise: Norm | None = None,
        target: Target | None = None,
        divergence: Divergence | None = None,
        consistency_filter: bool | None = None,
        empty_classes: EmptyClasses | None = None,
        local_compares: Compares | None = None,
        local_itself: bool | None = None,
        local_repels: bool | None = None,
        train_mode: bool | None = None,
        seed: int | None = None,
    ) -> None:
        if filter_k is not None and filter_k != DROP_LAST and filter_k < 1:
            raise AdaptationError(f"expected filter_k of at least 1, or None to keep all members; got {filter_k}")
        if not temperature > 0 or neighbours < 1:
            raise AdaptationError(
                "expected a temperature above 0 and neighbours of at least 1; got "
                f"temperature {temperature}, neighbours {neighbours}"
            )
        self.variant = choose(
            compat,
            normalise=normalise,
            target=target,
            divergence=divergence,
            consistency_filter=consistency_filter,
            empty_classes=empty_classes,
            local_weight=local_weight,
            local_compares=local_compares,
            local_itself=local_itself,
            local_repels=local_repels,
            train_mode=train_mode,
        )
        if compat is not None:
            its: dict[str, Any] = {"steps": 1, "episodic": False, "predict": "before"}
            check_compat(compat, its, {"steps": steps, "episodic": episodic, "predict": predict})
            if filter_k is None:
                raise AdaptationError(f"compat {compat!r} can not keep all members; leave out filter_k None or compat")
        if seed is not None and not self.variant.train_mode:
            raise AdaptationError(f"seed {seed} without effect: nothing is random but in train_mode; leave it out")
        self.filter_k, self.neighbours, self.temperature, self.seed = filter_k, neighbours, temperature, seed or 0
        super().__init__(model, rate=rate, parameters=parameters, steps=steps, episodic=episodic, predict=predict)

    def _check_model(self, model: Classifier) -> None:
        check_model(model, self.parameters, local_weight=self.variant.local_weight)

    def _check_batch(self, images: Tensor) -> None:
        check_batch_statistics(images, self.model)

    def _configure(self, model: Classifier) -> Classifier:
        return configure_model(model, self.parameters, train_mode=self.variant.train_mode)

    def _start(self) -> None:
        super()._start()
        self.batches = 0
        with torch.no_grad():
            rows_CD = self.model.head.weight.detach().clone()
            self.bank = members(rows_CD, self.model.head(rows_CD))

    def _adapt(self, images: Tensor) -> Tensor:
        # Dropout takes no generator: the global one is lent a seed of ours for the batch, and given back.
        random = seeding.seeded(self.name, self.seed, self.batches) if self.variant.train_mode else nullcontext()
        with random:
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
            filter_k=self.filter_k,
            neighbours=self.neighbours,
            temperature=self.temperature,
            variant=self.variant,
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
