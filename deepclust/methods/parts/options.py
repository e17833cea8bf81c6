"""The options that methods share; each method adds its own in the `Config` of its file."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from deepclust.clustering import kmeans
from deepclust.config import (
    Auto,
    Backbone,
    Config,
    Count,
    Natural,
    NotEmpty,
    OptionalWidth,
    Pixels,
    Positive,
    Several,
    Width,
    config,
)
from deepclust.errors import ConfigError
from deepclust.methods.parts import sizes
from deepclust.training.optim import SGD, Optimiser, Precision
from deepclust.training.views import Colour, Crop


@config
class Shared(Config):
    """The network of all encoders, and blocks that an encoder's section takes over where it does not state them."""

    may_be_left_out: ClassVar[tuple[str, ...]] = ("batch_size", "accumulate", "optimiser", "crops", "colour")

    backbone: Backbone = "resnet18"
    """small, medium (twice as wide), resnet18, resnet34, resnet50, or any of timm's: timm/NAME."""
    stem: Literal["auto", "small", "imagenet"] = "auto"
    """Of a ResNet: small (3×3, no pooling), imagenet (7×7), or auto: small up to 64 pixels."""
    image_size: Pixels | Auto = "auto"
    """Side of the images of a network trained here, in pixels, unless its section states another; auto: the data set's
    own, for a folder the median shorter side, at most 64."""
    precision: Precision = "float32"
    """float32; bf16 or fp16 compute so on a GPU that has it, float32 elsewhere."""
    batch_size: Several | None = None
    """Images of an update."""
    accumulate: Count | None = None
    """Equal parts that a batch is computed in."""
    optimiser: Optimiser | None = None
    """How the parameters move."""
    crops: Annotated[tuple[Crop, ...], NotEmpty] | None = None
    """The resolutions of the crops."""
    colour: Colour | None = None
    """Flip and colour augmentation."""

    def _check(self) -> None:
        if self.stem != "auto" and not self.backbone.startswith("resnet"):
            raise ValueError(f"stem {self.stem!r} is a ResNet's; backbone {self.backbone!r} has only its own: say auto")


@config
class TrainedConfig(Config):
    """What every trained method has; each adds its own options."""

    inherits: ClassVar[tuple[str, ...]] = Shared.may_be_left_out

    epochs: Count = 200
    """Passes over the training images."""
    batch_size: Several = 256
    """Images of an update, over all processes."""
    accumulate: Count = 1
    """Equal parts that a batch is computed in, one after the other, to need less memory; batch normalisation sees one
    part at a time."""
    optimiser: Optimiser = SGD()
    """How the parameters move."""
    crops: Annotated[tuple[Crop, ...], NotEmpty] = (Crop(),)
    """The resolutions of the crops."""
    colour: Colour = Colour()
    """Flip and colour augmentation."""
    hidden_dim: OptionalWidth = 2048
    """Width of the projection head's hidden layer; 0 for a linear head."""
    dim: Width = 128
    """Dimension of the embeddings."""

    @property
    def views(self) -> int:
        """Crops of one image, over all resolutions."""
        return sum(crop.count for crop in self.crops)

    @property
    def part(self) -> int:
        """Images that go through the network at once."""
        return self.batch_size // self.accumulate

    def sized(self, *, images: int, image_size: int) -> Self:
        """The same options with every `auto` decided by the data.

        Args:
            images: Number of training images.
            image_size: Their side in pixels.

        Raises:
            ConfigError: If the options do not fit the data.
        """
        if self.batch_size > images:
            raise ConfigError(
                f"batch_size: expected at most {images}, the training images; got {self.batch_size}; "
                f"{'lower it' if images > 1 else 'add images'}"
            )
        return self

    def _check(self) -> None:
        if self.batch_size % self.accumulate or self.part < 2:
            raise ValueError(
                f"accumulate {self.accumulate} must divide batch_size {self.batch_size} into equal parts of at least "
                "two images"
            )
        if self.optimiser.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optimiser.warmup_epochs {self.optimiser.warmup_epochs:g} must be below epochs {self.epochs}: the "
                "rate would never be reached; lower it or raise epochs"
            )

    def _check_two_crops(self) -> None:
        if self.views != 2:
            raise ValueError(f"needs exactly two crops of each image, got {self.views}")

    def _check_queue(self, length: int | str) -> None:
        if isinstance(length, int) and length % self.batch_size:
            nearest = max(1, math.floor(length / self.batch_size + 0.5)) * self.batch_size
            raise ValueError(
                f"queue_length {length} must be a multiple of batch_size {self.batch_size}; the nearest is {nearest}"
            )


@config
class KMeansConfig(Config):
    """k-means during pretraining."""

    kmeans_iterations: Count = 20
    """Most Lloyd iterations."""
    kmeans_engine: kmeans.Engine = "faiss"
    """What searches for the nearest centroids: faiss, or torch; see `kmeans.engine_used`."""
    kmeans_restarts: Count = 1
    """Number of seeded runs; the best is kept."""


@config
class PrototypesConfig(TrainedConfig):
    """What methods with prototypes share."""

    heads: ClassVar[int] = 1  # prototype heads where the data decides
    prototypes: Auto | Several | Annotated[tuple[Several, ...], NotEmpty] = "auto"
    """Number of prototypes, K; a list has an entry for each prototype head; auto: see docs/methods/sizes.md."""
    temperature: Positive = 0.1
    """Temperature τ of the prediction."""
    assign_crops: Annotated[tuple[Natural, ...], NotEmpty] = (0, 1)
    """Numbers of the crops that are assigned to prototypes."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of prototypes of each head, once `auto` is decided."""
        assert self.prototypes != "auto"
        return (self.prototypes,) if isinstance(self.prototypes, int) else self.prototypes

    def sized(self, *, images: int, image_size: int) -> Self:
        """See the base class."""
        super().sized(images=images, image_size=image_size)
        if self.prototypes != "auto":
            return self
        return self.replaced(prototypes=(sizes.prototypes(images, image_size),) * self.heads)

    def _check(self) -> None:
        super()._check()
        if self.views < 2:
            raise ValueError("needs at least two crops of each image")
        if len(set(self.assign_crops)) < len(self.assign_crops) or max(self.assign_crops) >= self.views:
            raise ValueError(f"assign_crops must be distinct crop numbers below {self.views}, got {self.assign_crops}")
