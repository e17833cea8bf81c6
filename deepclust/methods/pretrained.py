"""Weights from elsewhere as a frozen encoder: a file in safetensors, or timm's published ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from deepclust import config
from deepclust.errors import CheckpointError, ConfigError
from deepclust.models import backbones
from deepclust.models.encoder import HEADER, Encoder

FROM_TIMM = "timm"
# torchvision's weights of ImageNet, and nearly all others of these architectures.
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_WRAPPERS = ("module.", "backbone.", "encoder.")
_HEADS = ("fc", "head", "classifier")


@config.config
class Config(config.Config):
    """Which weights, and how the images have to be given to them."""

    backbone: config.Backbone
    """Name of the backbone; a ResNet's stem and the number of channels are taken from the weights."""
    weights: str
    """Path of a safetensors file with the names of torchvision, of timm or of an encoder saved here, also behind the
    prefixes `module.`, `backbone.` and `encoder.`; or timm: the published weights of a backbone timm/NAME.TAG."""
    sha256: config.Hash | None = None
    """The file's SHA-256, in hexadecimal, so that a changed file is a changed parameter; null with timm."""
    input_size: config.Pixels | None = None
    """Side that the network gets, in pixels; null: the images as they are."""
    mean: tuple[config.Share, ...] | None = None
    """Mean of each channel that the weights were trained with, in [0, 1]; null: as an encoder saved here states, else
    as timm states, else ImageNet's for a ResNet."""
    std: tuple[config.Positive, ...] | None = None
    """Likewise the standard deviation."""

    def _check(self) -> None:
        if self.weights == FROM_TIMM:
            if not self.backbone.startswith(backbones.TIMM):
                raise ValueError(f"weights: {FROM_TIMM} needs a backbone timm/NAME.TAG, got {self.backbone!r}")
            if self.sha256 is not None:
                raise ValueError(f"sha256: expected null with weights: {FROM_TIMM}, got {self.sha256!r}; remove it")


def pretrained(options: Config, *, image_size: int, channels: int) -> Encoder:
    """An encoder with published or otherwise given weights, in eval mode and without gradients.

    Weights are loaded strictly. Only a classifier's are left out; `description["ignored"]` names them.

    Args:
        options: Which weights.
        image_size: Side of the images, in pixels.
        channels: 1 (grey) or 3 (RGB) of the images.

    Raises:
        ConfigError: If an option is at odds with the weights or the images.
        CheckpointError: If the weights are missing, damaged or not the backbone's.
    """
    backbone, weights, input_size = options.backbone, options.weights, options.input_size
    stated: dict[str, Any] = {}
    if weights == FROM_TIMM:
        tensors = backbones.download(backbone, image_size=input_size or image_size)
    else:
        tensors, stated = _read(Path(weights), options.sha256)
    tensors = _unwrapped(tensors)
    network_channels, stem = _first_layer(backbone, tensors, weights)
    mean, std = options.mean, options.std
    if mean is None or std is None:
        usual = stated or _usual(backbone)
        mean, std = mean or tuple(usual["mean"]), std or tuple(usual["std"])
    trained = Encoder(
        backbone=backbone,
        image_size=image_size,
        channels=channels,
        mean=list(mean),
        std=list(std),
        stem=stem,
        network_channels=network_channels,
        input_size=input_size,
    )
    trained.description["ignored"] = _fill(trained, tensors, weights)
    return trained.eval().requires_grad_(False)


def _read(path: Path, sha256: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and its description where it was saved here."""
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"weights: expected a .safetensors file or {FROM_TIMM}, got {str(path)!r}; other files may hold code and "
            'are not read: convert it once, `state = torch.load("FILE", map_location="cpu", weights_only=True); '
            'state = state.get("state_dict", state); safetensors.torch.save_file(state, "FILE.safetensors")`'
        )
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
    if sha256 is None or found != sha256.lower():
        raise ConfigError(
            f"sha256: expected the SHA-256 of {path}, {found}; got {sha256}; state it if the file is right"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            header = (opened.metadata() or {}).get(HEADER)
            stated = json.loads(header) if header else {}
            if header:
                config.check_fields(stated, {"mean": list[config.Share], "std": list[config.Positive]}, {})
            return {name: opened.get_tensor(name) for name in opened.keys()}, stated  # noqa: SIM118  # no mapping
    except Exception as error:  # safetensors raises its own, undocumented types on damaged files
        raise CheckpointError(f"the weights {path} are damaged ({error}); fetch them again") from error


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
            f"the weights in {weights} are not those of backbone {backbone}: it lacks {_some(missing)} and has the "
            f"unknown {_some(unknown)}; state the backbone that they belong to, or rename them"
        )
    for name, value in kept.items():
        if value.shape != expected[name].shape:
            raise CheckpointError(
                f"expected {name} of shape {tuple(expected[name].shape)} in {weights}, got {tuple(value.shape)}; state "
                "the backbone that the weights belong to, and as input_size the size that they were trained at"
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
