"""The sections under `pretrain`: optimisers, crops, and one class a method. The others are in schema.py."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from tasks.shared.operations.params.fields import Auto, Count, EncoderName, Flag, Natural, Positive, Section, Share

Decay = Annotated[float, Field(strict=True, ge=0)]
Momentum = Annotated[float, Field(strict=True, ge=0, lt=1)]
Prototypes = Annotated[int, Field(strict=True, ge=2)]
Backbone = Annotated[
    str, StringConstraints(pattern=r"^(small|medium|resnet18|resnet34|resnet50|timm/[A-Za-z0-9_.-]+)$")
]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Optimiser(Section):
    """What all optimisers share: linear warm-up and a cosine to `final_rate` times the rate, per step."""

    rate: Positive
    weight_decay: Decay
    decay_norm_and_bias: Flag
    clip_norm: Positive | None
    warmup_epochs: Annotated[float, Field(strict=True, ge=0)]
    final_rate: Share


class SGD(Optimiser):
    """SGD with momentum."""

    name: Literal["sgd"]
    momentum: Momentum


class LARS(Optimiser):
    """SGD with a trust ratio for each parameter (arXiv 1708.03888); `larc` never exceeds SGD's own rate."""

    name: Literal["lars", "larc"]
    momentum: Momentum
    trust: Positive


class AdamW(Optimiser):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    name: Literal["adamw"]
    betas: tuple[Momentum, Momentum]


class Crop(Section):
    """`count` random resized crops of one size: pixels, or a share of the image's side if at most 1."""

    count: Count
    size: Positive
    scale: tuple[Share, Share]
    ratio: tuple[Positive, Positive]

    @model_validator(mode="after")
    def _check(self) -> Crop:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be [low, high] with 0 < low <= high, got {list(self.scale)}")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio must be [low, high] with low <= high, got {list(self.ratio)}")
        if self.size > 1 and self.size != int(self.size):
            raise ValueError(f"size must be whole pixels, or a share of at most 1; got {self.size}")
        return self


class Colour(Section):
    """Probabilities of flip, colour jitter, grey and blur, and the jitter's strengths."""

    flip: Share
    jitter: Share
    brightness: Share
    contrast: Share
    saturation: Share
    hue: Annotated[float, Field(strict=True, ge=0, le=0.5)]
    grey: Share
    blur: Share


class Frozen(Section):
    """A baseline that pretrains trivially."""

    method: Literal["pixels", "random"]


class Pretrained(Section):
    """A frozen backbone whose weights come from elsewhere; see `deepclust.methods.pretrained`."""

    method: Literal["pretrained"]
    backbone: Backbone
    weights: str
    sha256: Hash | None
    input_size: Annotated[int, Field(strict=True, ge=8, le=1024)] | None
    mean: tuple[Share, ...] | None
    std: tuple[Positive, ...] | None

    @model_validator(mode="after")
    def _check(self) -> Pretrained:
        if self.weights == "timm" and not self.backbone.startswith("timm/"):
            raise ValueError(f"weights: timm needs a backbone timm/NAME.TAG, got {self.backbone!r}")
        return self


class Trained(Section):
    """What every trained method has."""

    epochs: Count
    batch_size: Annotated[int, Field(strict=True, ge=2)]
    accumulate: Count
    optimiser: Annotated[SGD | LARS | AdamW, Field(discriminator="name")]
    crops: Annotated[tuple[Crop, ...], Field(min_length=1)]
    colour: Colour
    hidden_dim: Natural
    dim: Count

    @property
    def views(self) -> int:
        """Crops of one image, over all resolutions."""
        return sum(crop.count for crop in self.crops)

    @model_validator(mode="after")
    def _check_parts(self) -> Trained:
        if self.batch_size % self.accumulate or self.batch_size // self.accumulate < 2:
            raise ValueError(
                f"accumulate {self.accumulate} must divide batch_size {self.batch_size} into equal parts of at least "
                "two images"
            )
        if self.optimiser.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optimiser.warmup_epochs {self.optimiser.warmup_epochs:g} must be below epochs {self.epochs}: the "
                "rate would never be reached; lower it or raise epochs"
            )
        return self

    def _needs_two_crops(self) -> None:
        if self.views != 2:
            raise ValueError(f"needs exactly two crops of each image, got {self.views}")


class _Clustering(Trained):
    """What SwAV and DeepCluster-v2 share."""

    prototypes: Auto | Prototypes | Annotated[tuple[Prototypes, ...], Field(min_length=1)]
    temperature: Positive
    assign_crops: Annotated[tuple[Natural, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_crops(self) -> _Clustering:
        if self.views < 2:
            raise ValueError("needs at least two crops of each image")
        if len(set(self.assign_crops)) < len(self.assign_crops) or max(self.assign_crops) >= self.views:
            raise ValueError(f"assign_crops must be distinct crop numbers below {self.views}, got {self.assign_crops}")
        return self


class SwAV(_Clustering):
    """SwAV; see deepclust/methods/swav.py."""

    method: Literal["swav"]
    epsilon: Positive
    sinkhorn_iterations: Count
    freeze_prototypes_steps: Natural
    hard_assignment_steps: Natural
    queue_length: Natural | Auto
    queue_start_epoch: Natural

    @model_validator(mode="after")
    def _check_queue(self) -> SwAV:
        _check_multiple(self.queue_length, self.batch_size)
        return self


class DeepClusterV2(_Clustering):
    """DeepCluster-v2; see deepclust/methods/deepcluster_v2.py."""

    method: Literal["deepcluster_v2"]
    kmeans_iterations: Count
    kmeans_engine: Literal["faiss", "torch"]
    kmeans_restarts: Count


class _Contrastive(Trained):
    """What MoCo and PCL share."""

    key_momentum: Share
    key_groups: Count
    queue_length: Count | Auto
    temperature: Positive

    @model_validator(mode="after")
    def _check_keys(self) -> _Contrastive:
        self._needs_two_crops()
        _check_multiple(self.queue_length, self.batch_size)
        part = self.batch_size // self.accumulate
        if part < 2 * self.key_groups:
            raise ValueError(
                f"key_groups {self.key_groups} need at least two images each, got {part} images at once; "
                f"lower key_groups to at most {part // 2}, or raise batch_size"
            )
        return self


class MoCo(_Contrastive):
    """MoCo; see deepclust/methods/moco.py."""

    method: Literal["moco"]


class PCL(_Contrastive):
    """PCL; see deepclust/methods/pcl.py."""

    method: Literal["pcl"]
    clusters: Annotated[tuple[Count, ...], Field(min_length=1)] | Auto
    negatives: Count | Auto
    warmup_epochs: Natural
    spherical: Flag
    kmeans_iterations: Count
    kmeans_engine: Literal["faiss", "torch"]
    kmeans_restarts: Count
    kmeans_every: Count
    kmeans_warm_start: Flag

    @model_validator(mode="after")
    def _check_clusters(self) -> PCL:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} must be below epochs {self.epochs}: the prototypes would never be "
                "used; lower it or raise epochs"
            )
        if self.clusters != "auto":
            if len(set(self.clusters)) < len(self.clusters):
                raise ValueError(f"clusters must be distinct, got {list(self.clusters)}: equal ones cluster alike")
            part = self.batch_size // self.accumulate
            negatives = min(self.clusters) - part if self.negatives == "auto" else self.negatives
            check_negatives(self.clusters, negatives, part)
        return self


class SimSiam(Trained):
    """SimSiam; see deepclust/methods/simsiam.py."""

    method: Literal["simsiam"]
    hidden_dim: Count
    projector_layers: Literal[2, 3]
    predictor_dim: Count
    constant_predictor_rate: Flag
    zero_init_residual: Flag

    @model_validator(mode="after")
    def _check(self) -> SimSiam:
        self._needs_two_crops()
        return self


MethodName = Literal["pixels", "random", "pretrained", "swav", "deepcluster_v2", "moco", "pcl", "simsiam"]
Method = Annotated[Frozen | Pretrained | SwAV | DeepClusterV2 | MoCo | PCL | SimSiam, Field(discriminator="method")]


def _check_multiple(length: int | str, batch_size: int) -> None:
    if isinstance(length, int) and length % batch_size:
        nearest = max(1, math.floor(length / batch_size + 0.5)) * batch_size
        raise ValueError(
            f"queue_length {length} must be a multiple of batch_size {batch_size}; the nearest is {nearest}"
        )


def check_negatives(clusters: tuple[int, ...], negatives: int, batch_size: int) -> None:
    """Refuse negatives that the clusters can not give when each image of a batch has a cluster of its own.

    Raises:
        ValueError: With the numbers and the remedy.
    """
    if not 1 <= negatives <= min(clusters) - batch_size:
        raise ValueError(
            f"negatives must be at least 1, and with batch_size {batch_size} not exceed the smallest of clusters, "
            f"{min(clusters)}, as a batch may hold that many positives; got {negatives}; raise clusters, or lower "
            "negatives or batch_size"
        )


class Shared(Section):
    """What all encoders have in common."""

    backbone: Backbone
    stem: Literal["auto", "small", "imagenet"]
    precision: Literal["float32", "bf16", "fp16"]

    @model_validator(mode="after")
    def _check(self) -> Shared:
        if self.stem != "auto" and not self.backbone.startswith("resnet"):
            raise ValueError(f"stem {self.stem!r} is a ResNet's; backbone {self.backbone!r} has only its own: say auto")
        return self


class Checkpoint(Section):
    """How often an unfinished run's state is saved."""

    every_steps: Count | None
    every_seconds: Positive | None
    keep: Count


class Pretrain(Section):
    """One section an encoder, what they share, what the watchdog does, and how a run goes on that was cut off."""

    watchdog: Literal["warn", "stop"]
    resume: Literal["auto", "require", "never"]
    checkpoint: Checkpoint
    shared: Shared
    encoders: dict[EncoderName, Method]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        own = {"watchdog", "resume", "checkpoint", "shared"}
        sections = {name: section for name, section in value.items() if name not in own}
        for name, section in sections.items():
            if isinstance(section, dict):
                sections[name] = {"method": name, **section}
        return {**{name: value[name] for name in own if name in value}, "encoders": sections}
