"""What params.yaml may say: one frozen class a section. `tasks.params` reads them.

No field has a default: params.yaml is the whole statement of a run, and DVC tracks it by value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from deepclust.errors import ConfigError
from tasks.shared.operations.params.adapt import Adapt
from tasks.shared.operations.params.fields import (
    Auto,
    Count,
    EncoderName,
    Flag,
    Natural,
    Positive,
    Section,
    Share,
    hint,
)
from tasks.shared.operations.params.pretrain import Method, MethodName, Pretrain


class Data(Section):
    """What `prepare` makes the arrays from."""

    source: Literal["FashionMNIST", "MNIST", "KMNIST", "CIFAR10", "CIFAR100", "SVHN", "STL10", "folder"]
    folder: str
    image_size: Annotated[int, Field(strict=True, ge=8, le=1024)] | Auto
    resize: Literal["crop", "pad", "stretch"]
    colour: Literal["grey", "rgb", "auto"]
    test_fraction: Annotated[float, Field(strict=True, gt=0, lt=1)]
    heldout_fraction: Annotated[float, Field(strict=True, gt=0, lt=1)]
    max_skipped: Share
    max_pixels: Count


class Embed(Section):
    """Feature extraction."""

    batch_size: Count


class Cluster(Section):
    """k-means on the embeddings."""

    k: Annotated[int, Field(strict=True, ge=2)] | Auto
    other_k: tuple[Annotated[int, Field(strict=True, ge=2)], ...]
    seeds: Count
    iterations: Count
    engine: Literal["faiss", "torch"]
    normalise: Flag
    silhouette_images: Annotated[int, Field(strict=True, ge=10)]
    gallery_images: Count


class Linear(Section):
    """kNN and the linear classifier."""

    neighbours: Annotated[tuple[Count, ...], Field(min_length=1)]
    temperatures: Annotated[tuple[Positive, ...], Field(min_length=1)]
    weight_decays: Annotated[tuple[Annotated[float, Field(strict=True, ge=0)], ...], Field(min_length=1)]
    iterations: Count


class Report(Section):
    """The comparison."""

    map_images: Annotated[int, Field(strict=True, ge=10)]


class Params(Section):
    """All of params.yaml."""

    seed: Natural
    encoders: Annotated[dict[EncoderName, MethodName], Field(min_length=1)]
    data: Data
    pretrain: Pretrain
    embed: Embed
    cluster: Cluster
    linear: Linear
    adapt: Adapt
    report: Report

    @model_validator(mode="before")
    @classmethod
    def _name_methods(cls, value: Any) -> Any:
        """An encoder's method stands in `encoders`, where dvc.yaml finds it; its section is read as that method's."""
        if not isinstance(value, dict):
            return value
        encoders, pretrain = value.get("encoders"), value.get("pretrain")
        if isinstance(encoders, list):
            raise ValueError("encoders: expected {name: method, …}, got a list; run `python -m tasks.params migrate`")
        if not isinstance(encoders, dict) or not isinstance(pretrain, dict):
            return value
        named = dict(pretrain)
        for name, method in encoders.items():
            section = pretrain.get(name)
            if isinstance(section, dict) and isinstance(method, str):
                if section.get("method", method) != method:
                    raise ValueError(
                        f"pretrain.{name}.method: expected {method!r}, as encoders says, got {section['method']!r}; "
                        "leave it out"
                    )
                named[name] = {"method": method, **section}
        return {**value, "pretrain": named}

    @model_validator(mode="after")
    def _check(self) -> Params:
        for name in self.encoders:
            if name not in self.pretrain.encoders:
                raise ValueError(
                    f"encoders names {name!r}, but there is no section pretrain.{name}; there are "
                    f"{', '.join(self.pretrain.encoders)}; add the section or mend the name"
                )
        return self

    def method(self, encoder: str) -> Method:
        """The encoder's section.

        Raises:
            ConfigError: If params.yaml has no such encoder.
        """
        if encoder not in self.pretrain.encoders:
            known = list(self.pretrain.encoders)
            raise ConfigError(
                f"expected an encoder of params.yaml ({', '.join(known)}), got {encoder!r}{hint(encoder, known)}"
            )
        return self.pretrain.encoders[encoder]
