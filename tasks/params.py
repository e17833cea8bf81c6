"""params.yaml as typed, frozen values: the only place that reads YAML.

No field has a default: params.yaml is the whole statement of a run, and DVC tracks it by value.

    python -m tasks.params check
"""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepclust.errors import ConfigError, DeepclustError
from tasks import layout

Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Auto = Literal["auto"]
Flag = Annotated[bool, Field(strict=True)]
EncoderName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Section(BaseModel):
    """A frozen mapping without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


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


class Optimiser(Section):
    """SGD with linear warm-up and a cosine to `final_rate` times the rate, per step."""

    rate: Positive
    momentum: Annotated[float, Field(strict=True, ge=0, lt=1)]
    weight_decay: Annotated[float, Field(strict=True, ge=0)]
    warmup_epochs: Annotated[float, Field(strict=True, ge=0)]
    final_rate: Share


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


class Trained(Section):
    """What every trained method has."""

    epochs: Count
    batch_size: Annotated[int, Field(strict=True, ge=2)]
    optimiser: Optimiser
    crops: Annotated[tuple[Crop, ...], Field(min_length=1)]
    colour: Colour
    hidden_dim: Natural
    dim: Count

    @property
    def views(self) -> int:
        """Crops of one image, over all resolutions."""
        return sum(crop.count for crop in self.crops)


class SwAV(Trained):
    """SwAV; see deepclust/methods/swav.py."""

    method: Literal["swav"]
    prototypes: Annotated[int, Field(strict=True, ge=2)]
    temperature: Positive
    epsilon: Positive
    sinkhorn_iterations: Count
    assign_crops: Annotated[tuple[Natural, ...], Field(min_length=1)]
    freeze_prototypes_steps: Natural

    @model_validator(mode="after")
    def _check(self) -> SwAV:
        if self.views < 2:
            raise ValueError("needs at least two crops of each image")
        if len(set(self.assign_crops)) < len(self.assign_crops) or max(self.assign_crops) >= self.views:
            raise ValueError(f"assign_crops must be distinct crop numbers below {self.views}, got {self.assign_crops}")
        return self


class PCL(Trained):
    """PCL; see deepclust/methods/pcl.py."""

    method: Literal["pcl"]
    key_momentum: Share
    queue_length: Count
    temperature: Positive
    clusters: Annotated[tuple[Count, ...], Field(min_length=1)]
    negatives: Count
    warmup_epochs: Natural
    kmeans_iterations: Count

    @model_validator(mode="after")
    def _check(self) -> PCL:
        if self.views != 2:
            raise ValueError(f"needs exactly two crops of each image, query and key; got {self.views}")
        if self.queue_length % self.batch_size:
            raise ValueError(
                f"queue_length {self.queue_length} must be a multiple of batch_size {self.batch_size}; the nearest is "
                f"{max(1, round(self.queue_length / self.batch_size)) * self.batch_size}"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} must be below epochs {self.epochs}: the prototypes would never be "
                "used; lower it or raise epochs"
            )
        smallest = min(self.clusters)
        if self.negatives > smallest - self.batch_size:
            raise ValueError(
                f"negatives {self.negatives} + batch_size {self.batch_size} must not exceed the smallest of clusters, "
                f"{smallest}: a batch may hold that many positives; raise clusters or lower negatives or batch_size"
            )
        return self


class SimSiam(Trained):
    """SimSiam; see deepclust/methods/simsiam.py."""

    method: Literal["simsiam"]
    hidden_dim: Count
    predictor_dim: Count
    constant_predictor_rate: Flag

    @model_validator(mode="after")
    def _check(self) -> SimSiam:
        if self.views != 2:
            raise ValueError(f"needs exactly two crops of each image, got {self.views}")
        return self


Method = Annotated[Frozen | SwAV | PCL | SimSiam, Field(discriminator="method")]
METHODS = ("pixels", "random", "swav", "pcl", "simsiam")


class Shared(Section):
    """What all encoders have in common."""

    backbone: Literal["small", "resnet18", "resnet34", "resnet50"]


class Pretrain(Section):
    """One section an encoder, and what they share."""

    shared: Shared
    encoders: dict[EncoderName, Method]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        sections = {name: section for name, section in value.items() if name != "shared"}
        for name, section in sections.items():
            if isinstance(section, dict):
                sections[name] = {"method": name, **section}
        return {"shared": value.get("shared"), "encoders": sections}


class Embed(Section):
    """Feature extraction."""

    batch_size: Count


class Cluster(Section):
    """k-means on the embeddings."""

    k: Annotated[int, Field(strict=True, ge=2)] | Auto
    other_k: tuple[Annotated[int, Field(strict=True, ge=2)], ...]
    seeds: Count
    iterations: Count
    normalise: Flag
    silhouette_images: Annotated[int, Field(strict=True, ge=10)]
    gallery_images: Count


class Linear(Section):
    """kNN and the linear classifier."""

    neighbours: Annotated[tuple[Count, ...], Field(min_length=1)]
    temperatures: Annotated[tuple[Positive, ...], Field(min_length=1)]
    weight_decays: Annotated[tuple[Annotated[float, Field(strict=True, ge=0)], ...], Field(min_length=1)]
    iterations: Count


class TSD(Section):
    """TSD's options; see deepclust/adaptation/tsd.py."""

    rate: Positive
    parameters: Literal["all", "affine", "body", "head"]
    filter_k: Count | None
    neighbours: Count
    local_weight: Annotated[float, Field(strict=True, ge=0)]
    temperature: Positive


class Adapt(Section):
    """Test-time adaptation to corrupted streams."""

    adapters: Annotated[tuple[Literal["source", "bn", "tsd"], ...], Field(min_length=1)]
    corruptions: Annotated[
        tuple[Literal["gaussian_noise", "gaussian_blur", "contrast", "brightness", "rotation"], ...],
        Field(min_length=1),
    ]
    severities: Annotated[tuple[Annotated[int, Field(strict=True, ge=1, le=5)], ...], Field(min_length=1)]
    images: Count
    batch_size: Count
    tsd: TSD


class Report(Section):
    """The comparison."""

    map_images: Annotated[int, Field(strict=True, ge=10)]


class Params(Section):
    """All of params.yaml."""

    seed: Natural
    encoders: Annotated[tuple[EncoderName, ...], Field(min_length=1)]
    data: Data
    pretrain: Pretrain
    embed: Embed
    cluster: Cluster
    linear: Linear
    adapt: Adapt
    report: Report

    @model_validator(mode="after")
    def _check(self) -> Params:
        for name in self.encoders:
            if name not in self.pretrain.encoders:
                raise ValueError(
                    f"encoders names {name!r}, but there is no section pretrain.{name}; there are "
                    f"{', '.join(self.pretrain.encoders)}; add the section or mend the name"
                )
        if len(set(self.encoders)) < len(self.encoders):
            raise ValueError(f"encoders must be distinct, got {list(self.encoders)}")
        return self

    def method(self, encoder: str) -> Frozen | SwAV | PCL | SimSiam:
        """The encoder's section.

        Raises:
            ConfigError: If params.yaml has no such encoder.
        """
        if encoder not in self.pretrain.encoders:
            known = list(self.pretrain.encoders)
            raise ConfigError(
                f"expected an encoder of params.yaml ({', '.join(known)}), got {encoder!r}{_hint(encoder, known)}"
            )
        return self.pretrain.encoders[encoder]


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-4 as a number, where YAML 1.1 sees a string, and refuses a key that comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is stated twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _hint(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def read(path: Path = layout.PARAMS) -> dict[str, Any]:
    """The raw mapping of a parameter file.

    Raises:
        ConfigError: If the file is missing, is no YAML, or is no mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"expected parameters in {path}, found none; run from the repository's root") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"expected sections in {path}, got {type(raw).__name__}")
    return raw


def parse(raw: dict[str, Any]) -> Params:
    """Validate a raw mapping.

    Raises:
        ConfigError: With the dotted path, what was expected, what came, and the nearest valid name of an unknown key.
    """
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_lines(error.errors())) from error


def _lines(errors: list[Any]) -> str:
    """At most three complaints, each with the path as the user wrote it; what came is said once a path."""
    found: dict[str, list[str]] = {}
    came: dict[str, str] = {}
    for item in errors:
        path, message = _complaint(item)
        found.setdefault(path, []).append(message)
        if message.startswith("expected"):
            came[path] = f", got {item['input']!r}"
    return "; ".join(f"{path}: {' or '.join(texts)}{came.get(path, '')}" for path, texts in list(found.items())[:3])


def _complaint(item: Any) -> tuple[str, str]:
    """Path and message of one of pydantic's errors."""
    location = [str(part) for part in item["loc"]]
    if location[:2] == ["pretrain", "encoders"]:  # how Pretrain gathers them; and without the union's tag
        location = ["pretrain", *location[2:3], *location[4:]]
    if location and re.match(r"constrained-|literal\[", location[-1]):  # the member of a union
        location.pop()
    path = ".".join(location) or "params.yaml"
    if item["type"] == "extra_forbidden":
        return path, f"unknown parameter{_hint(location[-1], _siblings(item['loc']))}"
    if item["type"] == "missing":
        return path, "missing; every parameter is stated in params.yaml"
    if item["type"] == "union_tag_invalid":
        return f"{path}.method", f"one of {', '.join(METHODS)} is expected, got {item['ctx']['tag']!r}"
    if item["type"] == "value_error":
        return path, item["msg"].removeprefix("Value error, ")
    return path, re.sub(r"^Input should (be )?", "expected ", item["msg"])


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    """Valid names beside the last part of a location."""
    current: Any = Params
    tags: dict[str, type[Section]] = {"pixels": Frozen, "random": Frozen, "swav": SwAV, "pcl": PCL, "simsiam": SimSiam}
    for index, part in enumerate(location[:-1]):
        if location[:2] == ("pretrain", "encoders") and index in (1, 2):
            continue
        if location[:2] == ("pretrain", "encoders") and index == 3:
            current = tags[str(part)]
        elif isinstance(part, str):
            current = current.model_fields[part].annotation
        else:
            current = current.__args__[0]
    return list(current.model_fields) if hasattr(current, "model_fields") else []


def load(path: Path = layout.PARAMS) -> Params:
    """Read and validate params.yaml. Raises: ConfigError, in one line."""
    return parse(read(path))


def main() -> None:
    """Check params.yaml, or say in one line what is wrong with it."""
    if sys.argv[1:] != ["check"]:
        sys.exit("usage: python -m tasks.params check")
    try:
        load()
    except DeepclustError as error:
        sys.exit(f"error: {error}")
    print("params.yaml is valid")


if __name__ == "__main__":
    main()
