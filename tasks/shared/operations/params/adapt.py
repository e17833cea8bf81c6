"""What params.yaml may say of test-time adaptation: the stage's options, and each adapter's, as its class has them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.shared.operations.params.fields import Count, Flag, Natural, Positive, Section, Share

AdapterName = Literal["source", "bn", "tent", "pseudo_label", "shot_im", "t3a", "tsd", "lame", "rotta", "roid"]
Corruption = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "rotation",
]
Parameters = Literal["all", "affine", "body", "head"]
Severity = Annotated[int, Field(strict=True, ge=1, le=5)]
NotNegative = Annotated[float, Field(strict=True, ge=0)]


class FineTune(Section):
    """The classifier `fine_tuned`."""

    epochs: Count
    batch_size: Annotated[int, Field(strict=True, ge=2)]  # BatchNorm takes no statistics from one image
    rate: Positive


class Common(Section):
    """What every adapter has."""

    episodic: Flag
    predict: Literal["before", "after"]


class Learner(Common):
    """What every adapter has that takes gradient steps."""

    rate: Positive
    parameters: Parameters
    steps: Count


class BN(Common):
    """Batch statistics."""

    prior: NotNegative


class Tent(Learner):
    """Tent's options."""


class PseudoLabel(Learner):
    """Pseudo-labels' options."""

    threshold: Annotated[float, Field(strict=True, ge=0, lt=1)]


class ShotIM(Learner):
    """SHOT-IM's options."""


class T3A(Common):
    """T3A's options."""

    filter_k: Count | None


class TSD(Learner):
    """TSD's options; single deviations of the original code can be chosen in the library only."""

    compat: Literal["original"] | None
    filter_k: Count | None
    neighbours: Count
    local_weight: NotNegative | None
    temperature: Positive

    @model_validator(mode="after")
    def _check(self) -> TSD:
        if self.compat is not None:
            its = {"local_weight": 0, "steps": 1, "episodic": False, "predict": "before"}
            given = {name: getattr(self, name) for name in its}
            against = [name for name, value in given.items() if value is not None and value != its[name]]
            if against:
                name = against[0]
                remedy = "make it null" if name == "local_weight" else f"make it {its[name]}"
                raise ValueError(
                    f"compat {self.compat!r} means {name} {its[name]}, got {given[name]}; {remedy}, or compat null"
                )
            if self.filter_k is None:
                raise ValueError(f"compat {self.compat!r} can not keep all members; give filter_k, or make compat null")
        if self.parameters == "head" and (self.compat is not None or self.local_weight == 0):
            raise ValueError(
                "without the local term no gradient reaches parameters head; choose other parameters, or compat null "
                "and a local_weight above 0"
            )
        return self


class LAME(Common):
    """LAME's options."""

    affinity: Literal["knn", "rbf", "linear"]
    neighbours: Count | None

    @model_validator(mode="after")
    def _check(self) -> LAME:
        if self.affinity == "linear" and self.neighbours is not None:
            raise ValueError(f"affinity 'linear' has no neighbours, got {self.neighbours}; make them null")
        return self


class RoTTA(Learner):
    """RoTTA's options."""

    memory_size: Count
    update_frequency: Count
    alpha: Share
    nu: Share
    lambda_t: NotNegative
    lambda_u: NotNegative
    flip: Flag
    seed: Natural


class ROID(Learner):
    """ROID's options."""

    momentum: Share
    temperature: Positive
    prior_correction: Literal["probabilities", "logits", "none"]
    flip: Flag
    seed: Natural


class Adapt(Section):
    """Test-time adaptation to shifted streams."""

    classifiers: Annotated[tuple[Literal["linear", "fine_tuned", "clusters"], ...], Field(min_length=1)]
    adapters: Annotated[tuple[AdapterName, ...], Field(min_length=1)]
    guard: Flag
    align: Flag
    settings: Annotated[
        tuple[Literal["reset", "continual", "mixed", "correlated"], ...],
        Field(min_length=1),
    ]
    batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1)]
    corruptions: tuple[Corruption, ...]
    severities: Annotated[tuple[Severity, ...], Field(min_length=1)]
    domains: str
    images: Count
    fine_tune: FineTune
    bn: BN
    tent: Tent
    pseudo_label: PseudoLabel
    shot_im: ShotIM
    t3a: T3A
    tsd: TSD
    lame: LAME
    rotta: RoTTA
    roid: ROID

    @model_validator(mode="after")
    def _check(self) -> Adapt:
        # Twice the same would count double in every mean.
        for name in ("classifiers", "adapters", "settings", "batch_sizes", "corruptions", "severities"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must be distinct, got {list(values)}")
        return self
