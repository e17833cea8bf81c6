"""All of params.yaml, one class a section.

The options of methods, clustering algorithms and adapters are in the `Config` of each one's file. They are read on
demand, so that a stage loads only code that its outputs depend on; `Params.check` reads them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import model_validator

from deepclust.config import (
    AtLeastTen,
    Auto,
    Bands,
    Config,
    Count,
    Flag,
    Folder,
    Fraction,
    MaxPixels,
    Name,
    Natural,
    NotEmpty,
    NotNegative,
    Pixels,
    Positive,
    Seed,
    SetShare,
    Several,
    Severity,
    Share,
    as_dict,
    check_name,
    config,
    hint,
    parse,
)
from deepclust.errors import ConfigError

if TYPE_CHECKING:
    from deepclust.adaptation import fine_tuning
    from deepclust.adaptation.base import AdapterConfig
    from deepclust.clustering import how_many
    from deepclust.methods.parts.options import Shared

_C = TypeVar("_C", bound=Config)
ImageSize: Any = Pixels | Auto


@config
class Data(Config):
    """What `prepare` makes the arrays from."""

    source: Literal["FashionMNIST", "MNIST", "KMNIST", "CIFAR10", "CIFAR100", "SVHN", "STL10", "folder"]
    """Name of a published data set, or folder."""
    folder: Folder
    """The images, where source is folder; a DVC dependency in any case."""
    images: Several | Literal["all"]
    """all, or the most to take, which the seed draws."""
    resize: Literal["crop", "pad", "stretch"]
    """crop: shorter side to an encoder's size, then the centre; pad: the whole image on black; stretch."""
    white: Positive | Literal["auto", "file"]
    """Of pixels of more than 8 bits: a value; file: as the format states it; auto: as measured over all images."""
    background: Literal["auto", "black", "white"]
    """What shows through transparent pixels; auto: black, or white behind a dark drawing."""
    pages: Literal["first", "middle", "max", "mean"] | Natural
    """Of a file with several pages: one of them, a number from 0, or the maximum or mean of all."""
    bands: Bands
    """Of a file with many bands: one (grey) or three (RGB), numbers from 0; none: the first three, or the first."""
    colour: Literal["grey", "rgb", "auto"]
    """grey, rgb, or auto: rgb as soon as one image has colour."""
    follow_links: Flag
    """Whether to take what symbolic links point to outside of the folder."""
    test_fraction: SetShare
    """Share of a folder without a test folder that is drawn for test."""
    heldout_fraction: SetShare
    """Share of the labelled training images that recipes and champions are chosen on."""
    max_skipped: Share
    """Share of unreadable files above which preparing fails."""
    max_pixels: MaxPixels
    """An image with more pixels is skipped unread."""


@config
class Checkpoint(Config):
    """How often an unfinished run's state is saved."""

    every_steps: Count | None
    """Updates between two states."""
    every_seconds: Positive | None
    """Seconds between two states."""
    keep: Count
    """How many states are kept."""


@config
class _WithSections(Config):
    """Options beside sections that are read when asked for."""

    sections: dict[str, Any]
    """The sections as they stand in the file."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        own = {field.name for field in dataclasses.fields(cls)} - {"sections"}
        return {name: value[name] for name in own if name in value} | {
            "sections": {name: section for name, section in value.items() if name not in own}
        }

    def own(self) -> dict[str, Any]:
        """The options without the sections, as plain values."""
        return {name: value for name, value in as_dict(self).items() if name != "sections"}

    beside: ClassVar[tuple[str, ...]] = ()  # keys of a section that are not options of what it is the section of

    def section(self, name: str, kind: type[_C], path: str) -> _C:
        """A section, with what it does not state from `shared`. Raises: ConfigError."""
        stated, shared = self.sections.get(name, {}), self.sections.get("shared", {})
        if isinstance(stated, dict):
            own = {field.name for field in dataclasses.fields(kind)}
            stated = {key: value for key, value in stated.items() if key in own or key not in self.beside}
        blocks = kind.inherits
        return parse(kind, merged({key: shared[key] for key in blocks if key in shared}, stated), f"{path}.{name}")


@config
class Pretrain(_WithSections):
    """How pretraining runs; its sections are `shared`, and one for each encoder."""

    beside: ClassVar[tuple[str, ...]] = ("method", "image_size")

    watchdog: Literal["warn", "stop"]
    """What happens when training collapses or diverges; docs/methods/watchdog.md says how it is judged."""
    resume: Literal["auto", "require", "never"]
    """auto: go on with a run that was cut off, if there is one; require: refuse if there is none; never: begin anew."""
    checkpoint: Checkpoint
    """How often an unfinished run's state is saved."""

    def _check(self) -> None:
        for name in self.sections:  # an encoder that is not in `encoders` can be trained by hand
            check_name(name)

    def network(self) -> dict[str, Any]:
        """What all encoders have in common, without the blocks, which are part of each one's options."""
        return {name: getattr(self.shared, name) for name in ("backbone", "stem", "precision")}

    def encoders(self) -> list[str]:
        """Names of the encoders' sections."""
        return [name for name in self.sections if name != "shared"]

    @cached_property
    def shared(self) -> Shared:
        """What all encoders have in common. Raises: ConfigError."""
        from deepclust.methods.parts.options import Shared

        return parse(Shared, self.sections.get("shared", {}), "pretrain.shared")


@config
class Embed(Config):
    """Feature extraction."""

    batch_size: Count
    """Images that go through the network at once."""


@config
class Cluster(_WithSections):
    """Clustering of the embeddings; its sections are `how_many`, and one for each algorithm."""

    algorithms: Annotated[tuple[str, ...], NotEmpty]
    """Algorithms that run side by side; docs/clusters.md has all."""
    primary: str
    """Which of them everything after uses; auto: the one that the label-free choice prefers."""
    k: Several | Literal["auto", "classes"]
    """Number of clusters; auto: an estimate without labels; classes: that of the classes, without any as auto."""
    other_k: tuple[Several, ...]
    """Further numbers of clusters: cuts of one tree, of which the clustering at k is a cut, too."""
    seeds: Count
    """How often each algorithm is fitted; metrics are means, the clusters shown are of the fit most like the others."""
    reject: Fraction
    """Share of the training images that are too unsure to belong to any cluster; what is as unsure has none either."""
    duplicates: Literal["keep", "first"]
    """Copies among the training images: keep all, or fit on the first of each group."""
    normalise: Flag
    """Whether features are brought to unit length first."""
    silhouette_images: AtLeastTen
    """Images that the silhouette is computed on."""
    gallery_images: Count
    """The most central images of each cluster on its contact sheet."""

    def _check(self) -> None:
        if len(set(self.algorithms)) < len(self.algorithms):
            raise ValueError(f"algorithms must be distinct, got {list(self.algorithms)}")
        if self.primary not in ("auto", *self.algorithms):
            raise ValueError(
                f"primary: expected auto or one of algorithms ({', '.join(self.algorithms)}), got {self.primary!r}; "
                "name it there, too"
            )

    def algorithm(self, name: str) -> Config:
        """The options of an algorithm. Raises: ConfigError."""
        from deepclust.clustering import algorithms

        return self.section(name, algorithms.config_class(name), "cluster")

    def how_many(self) -> how_many.Config:
        """The options of the estimate of k. Raises: ConfigError."""
        from deepclust.clustering import how_many

        return self.section("how_many", how_many.Config, "cluster")

    def complete(self) -> dict[str, Config]:
        """The options of `how_many` and of each algorithm that has a section."""
        found = {name: self.algorithm(name) for name in self.sections if name != "how_many"}
        return {"how_many": self.how_many(), **found}

    def check(self) -> None:
        """Read every section, and compare names with what there is. Raises: ConfigError."""
        from deepclust.clustering.algorithms import ALGORITHMS

        names = ["how_many", *ALGORITHMS]
        for name in self.sections:
            if name not in names:
                raise ConfigError(f"cluster.{name}: unknown parameter{hint(name, [*names, *self.own()])}")
        _check_names("cluster.algorithms", self.algorithms, ALGORITHMS)
        self.how_many()
        for name in ALGORITHMS:
            self.algorithm(name)


@config
class Linear(Config):
    """kNN and the linear classifier."""

    neighbours: Annotated[tuple[Count, ...], NotEmpty]
    """Numbers of neighbours of kNN to measure."""
    temperatures: Annotated[tuple[Positive, ...], NotEmpty]
    """Temperatures of its weights to measure."""
    weight_decays: Annotated[tuple[NotNegative, ...], NotEmpty]
    """Weight decays of the classifier; the best on the held-out images is used."""
    iterations: Count
    """Most L-BFGS iterations."""


@config
class Adapt(_WithSections):
    """Test-time adaptation to shifted streams; its sections are `shared`, `fine_tune`, and one for each adapter."""

    classifiers: Annotated[tuple[Literal["linear", "fine_tuned", "clusters"], ...], NotEmpty]
    """linear; fine_tuned: the linear one, then the whole network trained on the labels; clusters: needs no labels."""
    adapters: Annotated[tuple[str, ...], NotEmpty]
    """Which adapters are measured; source is always among them."""
    guard: Flag
    """Whether each adapter is measured a second time, with a fallback to bn and source."""
    align: Flag
    """Whether BatchNorm's running statistics become those of plain training images first."""
    settings: Annotated[tuple[str, ...], NotEmpty]
    """How shifts and classes follow one another."""
    batch_sizes: Annotated[tuple[Count, ...], NotEmpty]
    """Images that are met at once."""
    corruptions: tuple[str, ...]
    """Corruptions of the test images."""
    severities: Annotated[tuple[Severity, ...], NotEmpty]
    """Strengths of each corruption, 1 to 5."""
    domains: Folder
    """A folder domain/class/images that is met as it is; a DVC dependency in any case."""
    images: Count | Auto
    """Most test images of each shift; auto: 384, 256 or 128, the most for which the encoder stays within the budget."""
    encoders: tuple[Name, ...] | Auto
    """Encoders that are measured, whatever they cost; auto: all that stay within the budget."""
    budget: Positive | None
    """Estimated minutes of one core that an encoder may take; null: any."""

    def _check(self) -> None:
        # Twice the same would count double in every mean.
        for name in ("classifiers", "adapters", "settings", "batch_sizes", "corruptions", "severities"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must be distinct, got {list(values)}")

    def adapter(self, name: str) -> AdapterConfig:
        """The options of an adapter. Raises: ConfigError."""
        from deepclust.adaptation import ADAPTERS

        return self.section(name, ADAPTERS[name].config_class, "adapt")

    def fine_tune(self) -> fine_tuning.Config:
        """The options of the classifier `fine_tuned`. Raises: ConfigError."""
        from deepclust.adaptation import fine_tuning

        return self.section("fine_tune", fine_tuning.Config, "adapt")

    def complete(self) -> dict[str, Config]:
        """The options of `fine_tune` and of each adapter that has a section."""
        adapters = [name for name in self.sections if name not in ("shared", "fine_tune")]
        return {"fine_tune": self.fine_tune()} | {name: self.adapter(name) for name in adapters}

    def check(self) -> None:
        """Read every section, and compare names with what there is. Raises: ConfigError."""
        from deepclust.adaptation import ADAPTERS, shifts
        from deepclust.adaptation.base import LearnerConfig
        from deepclust.corruptions import CORRUPTIONS

        names = [name for name in ADAPTERS if name != "source"] + ["fine_tune"]
        for name in {"shared", *self.sections}.difference(names, ["shared"]):
            raise ConfigError(f"adapt.{name}: unknown parameter{hint(name, [*names, *self.own()])}")
        _check_names("adapt.adapters", self.adapters, ADAPTERS)
        _check_names("adapt.settings", self.settings, shifts.SETTINGS)
        _check_names("adapt.corruptions", self.corruptions, CORRUPTIONS)
        if "shared" in self.sections:
            parse(LearnerConfig, self.sections["shared"], "adapt.shared")
        self.fine_tune()
        for name in names[:-1]:
            self.adapter(name)


@config
class Report(Config):
    """The comparison."""

    map_images: AtLeastTen
    """Images on each map."""


@config
class Params(Config):
    """All of params.yaml."""

    seed: Seed
    """Decides everything that is random."""
    encoders: Annotated[dict[Name, str], NotEmpty]
    """The encoders that go through the stages, each with its method."""
    data: Data
    pretrain: Pretrain
    embed: Embed
    cluster: Cluster
    linear: Linear
    adapt: Adapt
    report: Report

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_earlier(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("encoders"), list):
            raise ValueError("encoders: expected {name: method, …}, got a list; run `python -m tasks.params migrate`")
        if isinstance(value, dict) and isinstance(value.get("data"), dict) and "image_size" in value["data"]:
            raise ValueError(
                "data.image_size: every encoder has its own size now; state pretrain.shared.image_size, and of an "
                "earlier file or recipe run `python -m tasks.params migrate FILE`"
            )
        return value

    def check(self) -> None:
        """Read what is read on demand: sections of methods, algorithms and adapters. Raises: ConfigError."""
        known = self.pretrain.encoders()
        for name in self.encoders:
            if name not in known:
                raise ConfigError(
                    f"encoders names {name!r}, but there is no section pretrain.{name}; there are "
                    f"{', '.join(known)}; add the section or mend the name"
                )
        assert self.pretrain.shared
        for name in known:
            self.options(name)
            self.image_size(name)
        self.cluster.check()
        self.adapt.check()
        if self.adapt.encoders != "auto":
            _check_names("adapt.encoders", self.adapt.encoders, self.encoders)

    def resolved(self, encoders: Iterable[str] | None = None) -> dict[str, Any]:
        """All values as plain ones, each section complete; of the encoders those given, or all."""
        names = encoders if encoders is not None else self.pretrain.encoders()
        network = self.pretrain.network() | {"image_size": self.pretrain.shared.image_size}
        sections = {name: {"image_size": self.image_size(name)} | as_dict(self.options(name)) for name in names}
        adapters = {name: as_dict(options) for name, options in self.adapt.complete().items()}
        return as_dict(self) | {
            "pretrain": self.pretrain.own() | {"shared": network} | sections,
            "cluster": self.cluster.own() | {name: as_dict(each) for name, each in self.cluster.complete().items()},
            "adapt": self.adapt.own() | adapters,
        }

    def method(self, encoder: str) -> str:
        """Name of an encoder's method: what `encoders` says, else its own name.

        Raises:
            ConfigError: If params.yaml has no such encoder, or its section states another method.
        """
        if encoder not in self.pretrain.sections or encoder == "shared":
            known = self.pretrain.encoders()
            raise ConfigError(
                f"expected an encoder of params.yaml ({', '.join(known)}), got {encoder!r}{hint(encoder, known)}"
            )
        section = self.pretrain.sections[encoder]
        stated = section.get("method") if isinstance(section, dict) else None
        method = self.encoders.get(encoder) or stated or encoder
        if stated not in (None, method):
            raise ConfigError(
                f"pretrain.{encoder}.method: expected {method!r}, as encoders says, got {stated!r}; leave it out"
            )
        return method

    def image_size(self, encoder: str) -> int | Literal["auto"]:
        """Side of an encoder's images, in pixels: what its section states, else `pretrain.shared`.

        Raises:
            ConfigError: If it is not valid, or there is no such encoder.
        """
        self.method(encoder)
        section, name = self.pretrain.sections[encoder], encoder
        if not isinstance(section, dict) or "image_size" not in section:
            section, name = self.pretrain.sections.get("shared", {}), "shared"
        size: int | Literal["auto"] = parse(ImageSize, section.get("image_size"), f"pretrain.{name}.image_size")
        return size

    def options(self, encoder: str) -> Config:
        """The options of an encoder's method.

        Raises:
            ConfigError: If params.yaml has no such encoder or method, or the section is not valid.
        """
        from deepclust.methods import METHODS, config_class

        method = self.method(encoder)
        if not isinstance(method, str) or method not in METHODS:
            where = f"encoders.{encoder}" if encoder in self.encoders else f"pretrain.{encoder}"
            raise ConfigError(
                f"{where}: expected a method ({', '.join(METHODS)}), got {method!r}{hint(method, METHODS)}"
            )
        options: Config = self.pretrain.section(encoder, config_class(method), "pretrain")
        return options


def merged(shared: Any, own: Any) -> Any:
    """Mappings key by key, everything else as a whole; an optimiser takes none of another's options with it."""
    both = isinstance(shared, Mapping) and isinstance(own, Mapping)
    if not both or own.get("name", shared.get("name")) != shared.get("name"):
        return own
    return {**shared, **{key: merged(shared[key], value) if key in shared else value for key, value in own.items()}}


def _check_names(path: str, names: Iterable[str], known: Iterable[str]) -> None:
    for index, name in enumerate(names):
        if name not in known:
            raise ConfigError(f"{path}.{index}: expected one of {', '.join(known)}; got {name!r}{hint(name, known)}")
