"""Backbones by name: module and feature dimension.

`small` is made for two CPU cores and images of 16 to 64 pixels: a stride-2 4×4 stem, then residual blocks of 32, 64 and
128 channels; `medium` has twice the channels. The ResNets (arXiv 1512.03385) are torchvision's. Their `small` stem is
the usual one for small images, a 3×3 convolution of stride 1 and no pooling (SimCLR, arXiv 2002.05709, appendix B.9),
their `imagenet` stem the original 7×7 of stride 2 with pooling. `timm/NAME` is any model of timm, initialised as timm
does; timm is imported for these alone, because that takes seconds.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepclust.errors import ConfigError
from deepclust.models import hub, weights

SMALL_IMAGE = 64
STEMS = ("auto", "small", "imagenet")
TIMM = "timm/"
_RESNETS = ("resnet18", "resnet34", "resnet50")
_HUB_FILE = "model.safetensors"


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.convolution2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.activation = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm1(self.convolution1(x)))
        out: Tensor = self.activation(self.norm2(self.convolution2(y)) + self.shortcut(x))
        return out


def _convnet(width: int, channels: int, image_size: int) -> tuple[nn.Module, int]:
    net = nn.Sequential(
        nn.Conv2d(channels, width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        ResidualBlock(width, width, 1),
        ResidualBlock(width, 2 * width, 2),
        ResidualBlock(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return net, 4 * width


def _pixels(channels: int, image_size: int) -> tuple[nn.Module, int]:
    return nn.Flatten(), channels * image_size**2


def _resnet(name: str, *, channels: int, stem: str) -> tuple[nn.Module, int]:
    from torchvision import models

    net = getattr(models, name)(weights=None)
    dim: int = net.fc.in_features
    net.fc = nn.Identity()
    if stem == "small":
        net.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return net, dim


_OTHERS: dict[str, Callable[[int, int], tuple[nn.Module, int]]] = {
    "pixels": _pixels,
    "small": functools.partial(_convnet, 32),
    "medium": functools.partial(_convnet, 64),
}


def build(name: str, *, channels: int, image_size: int, stem: str = "auto") -> tuple[nn.Module, int]:
    """A freshly initialised backbone.

    Args:
        name: `pixels`, `small`, `medium`, `resnet18`, `resnet34`, `resnet50`, or `timm/` and a name of timm's.
        channels: Channels of the images.
        image_size: Side of the images in pixels; decides the stem left at `auto`, the dimension of `pixels` and the
            position embedding of timm's transformers.
        stem: `small`, `imagenet`, or `auto`: `small` up to 64 pixels. Only ResNets have this choice.

    Returns:
        The module, images (batch, channels, height, width) to features (batch, dim), and dim.

    Raises:
        ConfigError: If there is no backbone of that name, or it can not take such images or that stem.
    """
    chosen = resolve_stem(name, image_size=image_size, stem=stem)
    if chosen is not None:
        return _resnet(name, channels=channels, stem=chosen)
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), channels=channels, image_size=image_size)
    return _OTHERS[name](channels, image_size)


def resolve_stem(name: str, *, image_size: int, stem: str) -> str | None:
    """The stem that `build` gives a backbone: `small` or `imagenet`, or None for one without that choice.

    Raises:
        ConfigError: If there is no backbone of that name, or it has no such stem.
    """
    if name not in _OTHERS and name not in _RESNETS and not name.startswith(TIMM):
        known = ", ".join([*_OTHERS, *_RESNETS, f"{TIMM}NAME"])
        raise ConfigError(f"backbone: expected one of {known}; got {name!r}")
    if stem not in STEMS:
        raise ConfigError(f"stem: expected one of {', '.join(STEMS)}; got {stem!r}")
    if name in _RESNETS:
        return stem if stem != "auto" else "small" if image_size <= SMALL_IMAGE else "imagenet"
    if stem != "auto":
        raise ConfigError(f"stem: expected 'auto', as {name} has one stem only; got {stem!r}; only ResNets have two")
    return None


def first_convolution(name: str) -> str:
    """Name of the module that sees the images; for a model of timm's empty where timm does not say.

    Raises:
        ConfigError: If there is no backbone of that name.
    """
    if name.startswith(TIMM):
        first = timm_config(name).first_conv or ""
        return first if isinstance(first, str) else str(first[0])
    return "0" if resolve_stem(name, image_size=SMALL_IMAGE, stem="auto") is None else "conv1"


def timm_config(name: str) -> Any:
    """What timm knows of the weights of `timm/NAME` or `timm/NAME.TAG`: mean, std, classifier, first_conv and more.

    Raises:
        ConfigError: If timm has no such model or weights, or is not installed.
    """
    timm = _import_timm()
    model, _, tag = name.removeprefix(TIMM).partition(".")
    if not timm.is_model(model):
        near = ", ".join(difflib.get_close_matches(model, timm.list_models(), n=5))
        raise ConfigError(
            f"backbone: timm {timm.__version__} has no model {model!r}; "
            f"{f'the nearest names are {near}' if near else 'timm.list_models() names them all'}"
        )
    tags = {known.partition(".")[2] for known in timm.list_pretrained(f"{model}.*")}
    if tag and tag not in tags:
        raise ConfigError(
            f"backbone: timm {timm.__version__} has no weights {tag!r} of {model}; "
            f"it knows {', '.join(sorted(tags)) or 'none'}"
        )
    return timm.get_pretrained_cfg(name.removeprefix(TIMM)) or timm.models.PretrainedCfg()


def published(name: str) -> Any:
    """What timm knows of the published weights of `timm/NAME.TAG`, as `timm_config`.

    Raises:
        ConfigError: If timm has no weights of that name.
    """
    config = timm_config(name)
    if "." not in name or not config.hf_hub_id:
        known = ", ".join(TIMM + found for found in _import_timm().list_pretrained(f"{name.removeprefix(TIMM)}.*"))
        raise ConfigError(
            f"backbone: expected timm/NAME.TAG with published weights, got {name!r}; known: {known or '-'}"
        )
    return config


def download(name: str, *, image_size: int) -> dict[str, Tensor]:
    """The published weights of `timm/NAME.TAG`, classifier included, fitted to the image size by timm.

    Only a safetensors file is fetched, and none that is in the hub's local cache.

    Raises:
        ConfigError: If timm has no weights of that name.
        CheckpointError: If they can not be fetched.
    """
    state = weights.load(hub.fetch(published(name).hf_hub_id, _HUB_FILE))
    # Through timm's own loading, strict with the classifier: it fits position embeddings to another image size.
    net = _create(
        name.removeprefix(TIMM),
        image_size=image_size,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": state},
    )
    return dict(net.state_dict())


def _timm(name: str, *, channels: int, image_size: int) -> tuple[nn.Module, int]:
    net = _create(name, image_size=image_size, in_chans=channels, num_classes=0)
    try:
        features = _output(net, channels, image_size)
    except Exception as error:  # whatever the model's own layers raise
        raise _unfit(name, (channels, image_size, image_size), error) from error
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ConfigError(f"backbone: expected features (2, dim) of 2 images, {TIMM}{name} gives {shape}; take another")
    return net, features.shape[1]


@torch.no_grad()
def _output(net: nn.Module, channels: int, size: int) -> Any:
    """What a copy of the network gives for two images on `meta`, where nothing is computed."""
    return copy.deepcopy(net).eval().to("meta")(torch.zeros(2, channels, size, size, device="meta"))


def _create(name: str, *, image_size: int, **options: Any) -> nn.Module:
    create: Callable[..., nn.Module] = _import_timm().create_model
    fixed = timm_config(name).fixed_input_size
    try:
        if not fixed:
            return create(name, **options)
        # Transformers: position embeddings of this size, and, where the model has the option, crops of other sizes.
        options["img_size"] = image_size
        with contextlib.suppress(TypeError):
            return create(name, dynamic_img_size=True, **options)
        return create(name, **options)
    except Exception as error:  # whatever the model's own layers raise
        raise _unfit(name, (options.get("in_chans", 3), image_size, image_size), error) from error


def _unfit(name: str, shape: tuple[int, ...], error: Exception) -> ConfigError:
    return ConfigError(
        f"backbone: {TIMM}{name} can not take images of shape {shape} ({_line(error)}); "
        "take images of another size (`image_size`) or another model"
    )


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"backbone: names that begin with {TIMM} need timm, which can not be imported ({_line(error)}); "
            "install it: pip install timm"
        ) from error
    return timm


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_crops(backbone: nn.Module, sizes: Sequence[int], *, channels: int) -> None:
    """Refuse sizes of crops that a backbone can not take.

    Raises:
        ConfigError: With the crop and what the backbone's layers say.
    """
    for number, size in enumerate(sizes):
        try:
            _output(backbone, channels, size)
        except Exception as error:  # whatever the backbone's own layers raise
            raise ConfigError(
                f"crops.{number}.size: the backbone can not take crops of {size} pixels ({_line(error)}); "
                "choose another size"
            ) from error


def zero_init_residual(module: nn.Module) -> int:
    """Set the weight of the last norm of every residual block to zero, so that each block starts as its shortcut.

    Source: arXiv 1706.02677, section 5.1. timm's blocks know their own last norm (`zero_init_last`).

    Returns:
        The number of norms set; 0 if the module has no residual blocks that are known here.
    """
    from torchvision.models import resnet

    norms: list[nn.Module] = []
    others = 0
    for block in module.modules():
        if isinstance(block, ResidualBlock | resnet.BasicBlock):
            norms.append(block.norm2 if isinstance(block, ResidualBlock) else block.bn2)
        elif isinstance(block, resnet.Bottleneck):
            norms.append(block.bn3)
        elif callable(zero_last := getattr(block, "zero_init_last", None)):
            zero_last()
            others += 1
    for norm in norms:
        nn.init.zeros_(norm.weight)  # type: ignore[arg-type]  # a norm's, not any module's
    return len(norms) + others
