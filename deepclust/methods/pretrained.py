"""Weights from elsewhere as a frozen encoder: a file in safetensors, or timm's published ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from deepclust import config
from deepclust.errors import CheckpointError, ConfigError
from deepclust.models import backbones, efficientnet_lite0
from deepclust.models.encoder import HEADER, Encoder
from deepclust.models.pooling import Pooling

FROM_TIMM = "timm"
_WORDS = (efficientnet_lite0.NAME, FROM_TIMM)
# torchvision's weights of ImageNet, and nearly all others of these architectures.
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_IMAGENET_SIZE, _SMALL_SIZE = 224, 32
_HEADER_KEYS = {
    "backbone": config.Backbone,
    "mean": list[config.Share],
    "std": list[config.Positive],
    "image_size": config.Side,
    "input_size": config.Side | None,
    "pooling": Pooling,
}
_TORCH_FILES = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".pkl")
_WRAPPERS = ("module.", "backbone.", "encoder.")
_HEADS = ("fc", "head", "classifier")


@config.config
class Config(config.Config):
    """Which weights, and how the images have to be given to them."""

    may_be_left_out = ("backbone", "image_size", "pooling", "sha256", "mean", "std")

    weights: str
    """efficientnet_lite0: those of a package; timm: the published weights of a backbone timm/NAME.TAG, by timm's hub;
    or the path of a safetensors file with the names of torchvision, of timm or of an encoder saved here, also behind
    the prefixes `module.`, `backbone.` and `encoder.`."""
    backbone: config.Backbone | config.Auto = "auto"
    """Name of the backbone; auto: as the weights state it, which files of ours and of tasks.convert do. A ResNet's stem
    and the number of channels are taken from the weights."""
    image_size: config.Pixels | config.Auto = "auto"
    """Side that the network gets, in pixels; auto: what the weights were made for."""
    pooling: Pooling = "auto"
    """What features are made of a transformer's tokens: cls, the class token; mean, of the patches' tokens; cls+mean,
    both; auto: as the weights' file states, else the network's own."""
    sha256: config.Hash | None = None
    """The file's SHA-256, in hexadecimal, so that a changed file is a changed parameter; null without a file."""
    mean: tuple[config.Share, ...] | None = None
    """Mean of each channel that the weights were trained with, in [0, 1]; null: as the file states, else as timm
    states, else ImageNet's for a ResNet."""
    std: tuple[config.Positive, ...] | None = None
    """Likewise the standard deviation."""

    def _check(self) -> None:
        if self.weights == FROM_TIMM and not self.backbone.startswith(backbones.TIMM):
            raise ValueError(f"weights: {FROM_TIMM} needs a backbone timm/NAME.TAG, got {self.backbone!r}")
        if self.weights == efficientnet_lite0.NAME and self.backbone not in ("auto", efficientnet_lite0.BACKBONE):
            raise ValueError(f"backbone: expected auto with weights: {self.weights}, got {self.backbone!r}")
        if self.weights in _WORDS and self.sha256 is not None:
            raise ValueError(f"sha256: expected null with weights: {self.weights}, got {self.sha256!r}; remove it")


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where weights come from, and what is known of them before they are loaded."""

    backbone: str
    image_size: int  # that they were made for
    header: Mapping[str, Any]  # what a file says of itself
    tensors: Callable[[int], dict[str, Tensor]]  # for images of a side


def wanted_size(options: Config) -> int:
    """Side of the images that the network gets, in pixels. Nothing is downloaded.

    Raises:
        ConfigError: If timm has no such model or weights, the file's hash or backbone is not the stated one, or the
            network can not take this side or pooling.
        CheckpointError: If the file or package is missing or damaged.
    """
    source = _source(options)
    size = _size(options, source)
    Encoder(  # which refuses what it can not take
        backbone=source.backbone, image_size=size, channels=3, mean=[0.5] * 3, std=[0.5] * 3, pooling=options.pooling
    )
    return size


def _size(options: Config, source: _Source) -> int:
    return source.image_size if options.image_size == "auto" else options.image_size


def pretrained(options: Config, *, image_size: int, channels: int) -> Encoder:
    """An encoder with published or otherwise given weights, in eval mode and without gradients.

    Weights are loaded strictly. Only a classifier's are left out; `description["ignored"]` names them. Images of
    another side than `wanted_size` are resized by the encoder.

    Args:
        options: Which weights.
        image_size: Side of the images, in pixels.
        channels: 1 (grey) or 3 (RGB) of the images.

    Raises:
        ConfigError: If an option is at odds with the weights or the images.
        CheckpointError: If the weights are missing, damaged or not the backbone's.
    """
    source = _source(options)
    size = _size(options, source)
    tensors = source.tensors(size)
    network_channels, stem = _first_layer(source.backbone, tensors, options.weights)
    mean, std = options.mean or source.header.get("mean"), options.std or source.header.get("std")
    if mean is None or std is None:
        usual = _usual(source.backbone)
        mean, std = mean or usual["mean"], std or usual["std"]
    trained = Encoder(
        backbone=source.backbone,
        image_size=image_size,
        channels=channels,
        mean=list(mean),
        std=list(std),
        stem=stem,
        network_channels=network_channels,
        input_size=None if size == image_size else size,
        pooling=options.pooling if options.pooling != "auto" else source.header.get("pooling", "auto"),
    )
    trained.description["ignored"] = _fill(trained, tensors, options.weights)
    return trained.eval().requires_grad_(False)


def repeated(encoder: Encoder) -> str | None:
    """A line that says that grey images are repeated for a network of colour images; None where they are not."""
    channels: int = encoder.description["network_channels"]
    if encoder.description["channels"] == channels:
        return None
    return f"grey images are repeated for the network's {channels} channels"


def enlarged(options: Config, encoder: Encoder) -> str | None:
    """A line that says that the network gets more pixels than the images hold; None where it does not."""
    stored, size = encoder.description["image_size"], encoder.description["input_size"]
    if size is None or size <= stored:
        return None
    why = f"its weights were made for {size} px" if options.image_size == "auto" else f"its image_size is {size} px"
    return f"{why}, the images hold {stored}: enlarged"


def _source(options: Config) -> _Source:
    weights, backbone = options.weights, options.backbone
    if weights == efficientnet_lite0.NAME:
        efficientnet_lite0.find()
        return _Source(
            efficientnet_lite0.BACKBONE, efficientnet_lite0.IMAGE_SIZE, {}, lambda size: efficientnet_lite0.load()
        )
    if weights == FROM_TIMM:
        size = int(backbones.published(backbone).input_size[-1])
        return _Source(backbone, size, {}, lambda size: _unwrapped(backbones.download(backbone, image_size=size)))
    tensors, header = _read(Path(weights), options.sha256)
    tensors = _unwrapped(tensors)
    if backbone == "auto":
        backbone = header.get("backbone", "auto")
    if backbone == "auto":
        raise ConfigError(
            f"backbone: {weights} does not say which network its weights are of; state it: resnet18, …, timm/NAME"
        )
    size = header.get("input_size") or header.get("image_size") or _usual_size(backbone, tensors, weights)
    return _Source(backbone, size, header, lambda size: tensors)


def _read(path: Path, sha256: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what its header says of them."""
    if path.suffix != ".safetensors":
        raise ConfigError(f"weights: expected {', '.join(_WORDS)} or a .safetensors file, got {_remedy(str(path))}")
    if not path.is_file():
        raise CheckpointError(
            f"expected weights in {str(path)!r}, found {'no file' if path.exists() else 'none'}; mend the path"
        )
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"expected weights in {path}, can not read it ({error.strerror}); mend the path"
        ) from error
    if sha256 is None or found != sha256:
        raise ConfigError(
            f"sha256: expected the SHA-256 of {path}, {found}; got {sha256}; state it if the file is right"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            header = (opened.metadata() or {}).get(HEADER)
            stated = json.loads(header) if header else {}
            config.check_fields(stated, {}, _HEADER_KEYS)
            return {name: opened.get_tensor(name) for name in opened.keys()}, stated  # noqa: SIM118  # no mapping
    except Exception as error:  # safetensors raises its own, undocumented types on damaged files
        raise CheckpointError(f"the weights {path} are damaged ({error}); fetch them again") from error


def _remedy(weights: str) -> str:
    if weights.startswith(backbones.TIMM):
        return f"{weights!r}; for timm's published weights state `weights: {FROM_TIMM}, backbone: {weights}`"
    if Path(weights).suffix in _TORCH_FILES:
        return f"{weights!r}, which may hold code; `python -m tasks.convert {weights}` makes one of its weights"
    return f"{weights!r}{config.hint(weights, _WORDS)}"


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes that all of them carry."""
    while tensors:
        prefix = next((found for found in _WRAPPERS if all(name.startswith(found) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _first_layer(backbone: str, tensors: Mapping[str, Tensor], weights: str) -> tuple[int, str]:
    """Channels that the network takes, and the stem it has."""
    layer = backbones.first_convolution(backbone)
    shape: tuple[int, ...] = tuple(tensors[f"{layer}.weight"].shape) if f"{layer}.weight" in tensors else ()
    if backbone.startswith(backbones.TIMM):
        # Some of timm's networks rearrange or flatten pixels before their first weights.
        plain = len(shape) == 4 and shape[1] in (1, 3)
        return shape[1] if plain else int(backbones.timm_config(backbone).input_size[0]), "auto"
    if len(shape) != 4:
        raise CheckpointError(
            f"expected weights of {backbone} with a convolution {layer} in {weights}, found "
            f"{_some(tensors)}; state the backbone that they belong to, or rename them"
        )
    if backbones.resolve_stem(backbone, image_size=shape[-1], stem="auto") is None:
        return shape[1], "auto"
    if shape[-1] not in (3, 7):
        raise CheckpointError(
            f"expected a first convolution of 3×3 or 7×7 in {weights}, got {shape[-1]}×{shape[-1]}; "
            "take other weights, or a backbone of timm's that has this stem"
        )
    return shape[1], "small" if shape[-1] == 3 else "imagenet"


def _usual_size(backbone: str, tensors: Mapping[str, Tensor], weights: str) -> int:
    """Side of the images that weights of this architecture are usually made for, where a file does not say."""
    if backbone.startswith(backbones.TIMM):
        return int(backbones.timm_config(backbone).input_size[-1])
    return _IMAGENET_SIZE if _first_layer(backbone, tensors, weights)[1] == "imagenet" else _SMALL_SIZE


def _usual(backbone: str) -> dict[str, list[float]]:
    """Mean and std that weights of this architecture are trained with, where there is such a custom."""
    if backbone.startswith(backbones.TIMM):
        config = backbones.timm_config(backbone)
        return {"mean": list(config.mean), "std": list(config.std)}
    if backbone.startswith("resnet"):
        return {"mean": _IMAGENET_MEAN, "std": _IMAGENET_STD}
    raise ConfigError(f"mean, std: expected those that the weights of {backbone} were trained with; state both")


def _fill(encoder: Encoder, tensors: Mapping[str, Tensor], weights: str) -> list[str]:
    """Load weights into the backbone, all of it; returns the names left out, a classifier's."""
    backbone = encoder.description["backbone"]
    expected = encoder.backbone.state_dict()
    heads = _heads(backbone)
    ignored = sorted(name for name in tensors if name not in expected and name.startswith(heads))
    kept = {name: value for name, value in tensors.items() if name not in ignored}
    # Steps counted by a norm are no weights, and older files lack them.
    missing = [name for name in expected if name not in kept and not name.endswith("num_batches_tracked")]
    unknown = [name for name in kept if name not in expected]
    if missing or unknown:
        raise CheckpointError(
            f"the weights in {weights} are not those of backbone {backbone}: the file lacks {_some(missing)} and has "
            f"the unknown {_some(unknown)}; state the backbone that they belong to, or make the file from its torch "
            "file: python -m tasks.convert FILE.pth"
        )
    for name, value in kept.items():
        if value.shape != expected[name].shape:
            raise CheckpointError(
                f"expected {name} of shape {tuple(expected[name].shape)} in {weights}, got {tuple(value.shape)}; state "
                "the backbone that the weights belong to, and as image_size the size that they were trained at"
            )
    encoder.backbone.load_state_dict(kept, strict=True)
    return ignored


def _heads(backbone: str) -> tuple[str, ...]:
    """How the names of a classifier's weights begin."""
    named: Any = backbones.timm_config(backbone).classifier if backbone.startswith(backbones.TIMM) else None
    own = [named] if isinstance(named, str) else list(named or [])
    return tuple(f"{name}." for name in [*_HEADS, *own])


def _some(names: Iterable[str]) -> str:
    known = list(names)
    return ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "") if known else "nothing"
