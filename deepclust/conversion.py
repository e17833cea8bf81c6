"""Weights in torch files of other projects, as tensors with the names of our backbones.

A layout is where the encoder stands among what training saved, and how its layers are named. Those of
docs/weights.md are known. A backbone with torchvision's ResNets keeps torchvision's names, any other timm's.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepclust.errors import CheckpointError, ConfigError
from deepclust.models import backbones, weights
from deepclust.models.encoder import HEADER

# Where training saves the state of its networks: of several, the one that is evaluated comes first.
_STATES = ("teacher", "state_dict_ema", "state_dict", "model_state_dict", "model_state", "model")
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# What may stand beside an encoder's own layers, by the first part of the name.
_HEADS = {
    *("fc", "head", "heads", "classifier", "linear", "projection_head", "projector", "prediction_head", "predictor"),
    *("prototypes", "mask_token"),
}
_STATE_ONLY = (
    "if you trust it, load it where it was made, save its weights alone, `torch.save({key: file[key] for key in "
    '("teacher", "state_dict", "model") if key in file}, "weights.pth")` (docs/weights.md), and convert that file'
)
_STATE_BACKBONE = "name the backbone that they belong to with --backbone (timm/NAME for any of timm's)"
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_IMAGENET_SIDE = 224
# arXiv 2006.09882's code has .228 where all others have .229.
_SWAV = {"mean": _IMAGENET["mean"], "std": [0.228, 0.224, 0.225]}

# How an encoder's names begin, whatever stands beside it; the first that is there counts.
_PREFIXES = ("encoder_q.", "base_encoder.", "teacher_backbone.", "backbone.", "encoder.", "")
_NUMBERED, _GENERATOR, _VIT = "layers by number", "ResNetGenerator", "vision transformer"  # styles of naming
_RESNETS: dict[
    tuple[bool, tuple[int, ...]], str
] = {  # by whether its blocks are bottlenecks, and their number in each layer
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
}
_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}  # by width and depth
# The children of torchvision's ResNet, which become numbers in `nn.Sequential(*resnet.children())`.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_TORCHVISION_VIT = [
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
]


@dataclass(frozen=True, kw_only=True)
class Converted:
    """An encoder's weights.

    Attributes:
        layout: What was recognised, in words.
        description: `backbone`, and where the layout tells them `input_size` (the side in pixels that the weights were
            made for), `mean` and `std` (of the images, in [0, 1]).
        tensors: By the names of the backbone, all of it, in float32.
        left_out: How many tensors of the file are not among them, by the beginning of their names.
        notes: What whoever uses the weights should know, a sentence each.
        network: The backbone, freshly initialised.
    """

    layout: str
    description: dict[str, Any]
    tensors: dict[str, Tensor]
    left_out: dict[str, int]
    notes: list[str]
    network: nn.Module


def read(path: Path) -> Any:
    """What a torch file holds: tensors, numbers and text in lists and mappings. No code of it is run.

    Raises:
        CheckpointError: If it is missing, is no torch file, or holds anything else.
    """
    if not path.is_file():
        raise CheckpointError(
            f"expected a torch file in {path}, found {'no regular file' if path.exists() else 'none'}; mend the path"
        )
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"can not read {path} ({error.strerror or error}); mend its access or its path"
        ) from error
    except Exception as error:  # of torch, of its unpickler or of Python's, by what is wrong
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} holds more than weights, an object of {wanted[1]}, and is not loaded, as that would run code "
                f"of the file; {_STATE_ONLY}"
            ) from error
        raise CheckpointError(
            f"expected a file of torch.save in {path}, got a damaged one or another kind; a safetensors file is "
            f"named as `weights` as it is; of another kind, {_STATE_ONLY}"
        ) from error


def convert(loaded: Any, backbone: str | None = None) -> Converted:
    """Find an encoder's weights among what training saved.

    Args:
        loaded: What `read` gives.
        backbone: Name of the backbone, see `deepclust.models.backbones.build`; None: what names and shapes say.

    Raises:
        ConfigError: If there is no such backbone.
        CheckpointError: If there are no weights of this backbone, or of one that is known, not all of them, tensors
            that it does not have, or some that are not finite.
    """
    if backbone:
        backbones.resolve_stem(backbone, image_size=_IMAGENET_SIDE, stem="auto")
        if backbone == "pixels":
            raise ConfigError("backbone: expected one with weights, got 'pixels'; name another")
    state, within, beside = _state(loaded)
    for prefix in _PREFIXES:
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not inside:
            continue
        tensors, style = _renamed(inside)
        name = backbone or _recognised(tensors) or _named(loaded)
        if name and _has_first_layer(name, tensors):
            break
    else:
        raise _unknown(state, backbone)
    network, channels, side = _network(name, tensors)
    expected = network.state_dict()
    layout, statistics = _layout(prefix, within, style, state, tensors)
    description: dict[str, Any] = {"backbone": name}
    stem = tensors["conv1.weight"].shape[-1] if name in _RESNETS.values() else None
    if statistics and channels == 3 and stem != 3:
        description |= {"input_size": side or _IMAGENET_SIDE, **statistics}
    elif side:
        description["input_size"] = side
    kept, notes = _fitted(name, tensors, expected)
    if "mean" not in description:
        notes.append("this layout does not tell mean and std of the images: state those of training")
    if stem == 3 and layout.startswith("solo-learn"):
        notes.append("solo-learn pads by 2 pixels before a 3×3 stem, this backbone by 1: features are near, not equal")
    left = [name.partition(".")[0] for name in state if not name.startswith(prefix)]
    left += [prefix + name.partition(".")[0] for name in tensors if name not in expected]
    return Converted(
        layout=layout,
        description=description,
        tensors=kept,
        left_out=dict(sorted((Counter(left) + beside).items())),
        notes=notes,
        network=network,
    )


def save(converted: Converted, path: Path) -> None:
    """Write the weights to a safetensors file with their description, and load a backbone with it.

    Raises:
        CheckpointError: If the file is not what was written.
        OSError: If the disk does not take it.
    """
    weights.save(converted.tensors, path, metadata={HEADER: json.dumps(converted.description)})
    weights.fill(converted.network, weights.load(path))


def _state(loaded: Any) -> tuple[dict[str, Tensor], str, Counter[str]]:
    """Tensors by name, without what wraps all of them; the key they stand under; how many stand under other keys."""
    within, beside = "", Counter[str]()
    for _ in range(3):  # a mapping may hold itself
        key = next((each for each in _STATES if isinstance(_item(loaded, each), Mapping)), None)
        if key is None:
            break
        within = within or key
        beside += Counter({str(name): len(_tensors(value)) for name, value in loaded.items() if name != key})
        loaded = loaded[key]
    tensors = _tensors(loaded)
    if not tensors:
        raise CheckpointError(f"expected tensors by name, as state_dict() gives, found none; {_STATE_ONLY}")
    for name, value in tensors.items():
        if value.is_meta or value.is_quantized or value.layout is not torch.strided:
            raise CheckpointError(
                f"expected plain numbers in {name}, got a sparse, quantised or empty tensor; save those"
            )
    while wrapper := next((each for each in _WRAPPERS if all(name.startswith(each) for name in tensors)), None):
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors, within, beside


def _item(loaded: Any, key: str) -> Any:
    return loaded.get(key) if isinstance(loaded, Mapping) else None


def _tensors(value: Any) -> dict[str, Tensor]:
    items = value.items() if isinstance(value, Mapping) else ()
    return {name: each for name, each in items if isinstance(name, str) and isinstance(each, Tensor)}


def _renamed(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors by torchvision's names of a ResNet, or by timm's, and how they were named."""
    if {"0.weight", "4.0.conv1.weight", "7.0.conv1.weight"} <= tensors.keys():
        parts = {name: name.partition(".") for name in tensors}
        named = {name: f"{_CHILDREN.get(first, first)}.{rest}" for name, (first, _, rest) in parts.items()}
        return {named[name]: value for name, value in tensors.items()}, _NUMBERED
    if any(name.startswith("layer2.0.shortcut.") for name in tensors):
        return {name.replace(".shortcut.", ".downsample."): value for name, value in tensors.items()}, _GENERATOR
    if "conv_proj.weight" in tensors:
        for pattern, ours in _TORCHVISION_VIT:
            tensors = {re.sub(pattern, ours, name): value for name, value in tensors.items()}
        return tensors, _VIT
    if "blocks.0.ls1.gamma" in tensors or "blocks.0.0.ls1.gamma" in tensors:
        # DINOv2 trains with blocks in groups, whose number comes first.
        tensors = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value for name, value in tensors.items()}
        if {"register_tokens", "cls_token", "pos_embed"} <= tensors.keys() and tensors["pos_embed"].ndim == 3:
            own, rest = tensors["pos_embed"][:, :1].float(), tensors["pos_embed"][:, 1:]
            if own.shape == tensors["cls_token"].shape:
                # timm adds positions to patches alone, so the class token takes its own along.
                tensors |= {"cls_token": tensors["cls_token"].float() + own, "pos_embed": rest}
                tensors["reg_token"] = tensors.pop("register_tokens")
    return tensors, ""


def _recognised(tensors: Mapping[str, Tensor]) -> str | None:
    """The backbone whose names and shapes these are."""
    if {"0.weight", "2.0.conv1.weight", "5.0.conv1.weight"} <= tensors.keys():
        raise CheckpointError(
            "expected a ResNet, got lightly's ResNetGenerator in an nn.Sequential, which leaves out the first ReLU and "
            "is no backbone here; take weights of torchvision's ResNets in one, or of the whole ResNetGenerator"
        )
    if "conv1.weight" in tensors:
        blocks = tuple(_count(tensors, rf"layer{layer}\.(\d+)\.conv1\.weight") for layer in (1, 2, 3, 4))
        return _RESNETS.get(("layer1.0.conv3.weight" in tensors, blocks))
    if "patch_embed.proj.weight" in tensors and (side := _side(tensors)):
        return _vit(tensors, side)
    return None


def _vit(tensors: Mapping[str, Tensor], side: int) -> str | None:
    """timm's name of a vision transformer; the number of its heads, which no shape tells, is taken for width / 64."""
    width, _, _, patch = tensors["patch_embed.proj.weight"].shape
    size = _VITS.get((width, _count(tensors, r"blocks\.(\d+)\.norm1\.weight")))
    if size is None:
        return None
    if "blocks.0.ls1.gamma" in tensors:
        registers = f"_reg{tensors['reg_token'].numel() // width}" if "reg_token" in tensors else ""
        return _of_timm(f"vit_{size}_patch{patch}{registers}_dinov2")
    if size in ("tiny", "small") and not tensors["pos_embed"][0, 0].float().any():
        raise CheckpointError(
            f"expected {width // 64} heads, as timm's vit_{size} has, got a vision transformer of MoCo v3, which has "
            f"12; take its vit_base or ResNet-50, or state --backbone timm/vit_{size}_patch{patch}_{_IMAGENET_SIDE} if "
            f"you know that it has {width // 64}"
        )
    names = [f"vit_{size}_patch{patch}_{each}" for each in (side, _IMAGENET_SIDE)]
    return next((name for name in map(_of_timm, names) if name), None)


def _side(tensors: Mapping[str, Tensor]) -> int | None:
    """Side in pixels of the images that a vision transformer's positions are for."""
    positions, patches = tensors.get("pos_embed"), tensors.get("patch_embed.proj.weight")
    if positions is None or patches is None or positions.ndim != 3 or patches.ndim != 4 or not positions.numel():
        return None
    number = positions.shape[1] - (0 if "reg_token" in tensors else 1)
    return math.isqrt(number) * patches.shape[-1] if math.isqrt(number) ** 2 == number else None


def _count(names: Iterable[str], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def _named(loaded: Any) -> str | None:
    """The backbone that the file names, where timm knows it."""
    arch = _item(loaded, "arch")
    return _of_timm(arch) if isinstance(arch, str) and re.fullmatch(r"\w{1,64}", arch) else None


def _of_timm(name: str) -> str | None:
    try:
        backbones.timm_config(backbones.TIMM + name)
    except ConfigError:
        return None
    return backbones.TIMM + name


def _has_first_layer(name: str, tensors: Mapping[str, Tensor]) -> bool:
    layer = backbones.first_convolution(name)
    return not layer or f"{layer}.weight" in tensors


def _network(name: str, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, int, int | None]:
    """Such a backbone, its channels, and the side of its images where the weights tell it."""
    shape = tuple(getattr(tensors.get(f"{backbones.first_convolution(name)}.weight"), "shape", ()))
    channels, stem, side = 3, "auto", _side(tensors)
    if len(shape) == 4 and shape[1] in (1, 3):
        channels = shape[1]
    if backbones.resolve_stem(name, image_size=_IMAGENET_SIDE, stem="auto") is not None:
        if len(shape) != 4 or shape[1] not in (1, 3) or shape[-1] not in (3, 7):
            raise CheckpointError(
                f"expected a first convolution of 3×3 or 7×7 for 1 or 3 channels, got conv1.weight of shape {shape}; "
                f"{_STATE_BACKBONE}"
            )
        stem = "small" if shape[-1] == 3 else "imagenet"
    usual = backbones.timm_config(name).input_size[-1] if name.startswith(backbones.TIMM) else _IMAGENET_SIDE
    net, _ = backbones.build(name, channels=channels, image_size=side or usual, stem=stem)
    return net, channels, side


def _layout(
    prefix: str, within: str, style: str, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[str, Mapping[str, list[float]] | None]:
    """What was recognised, and mean and std that its weights are trained with, where it says so."""
    if prefix == "encoder_q.":
        return "MoCo v1, v2 or PCL, the query encoder", _IMAGENET
    if prefix == "base_encoder.":
        return "MoCo v3, the base encoder", _IMAGENET
    if within == "teacher":
        return "DINO or DINOv2, the teacher", _IMAGENET
    if prefix == "teacher_backbone.":
        return "lightly's DINO, the teacher", None
    if prefix == "encoder." and "encoder.fc.0.weight" in state:
        return "SimSiam, the encoder", _IMAGENET
    if style == _NUMBERED:
        return "lightly, a ResNet's layers by number", None
    if style == _GENERATOR:
        return "lightly's ResNetGenerator", None
    if prefix:
        return "solo-learn, or lightly with a ResNet's names", None
    if any(name.startswith(("prototypes.", "projection_head.")) for name in state):
        return "SwAV or DeepCluster-v2", _SWAV
    if style == _VIT:
        return "torchvision's vision transformer", _IMAGENET
    if "patch_embed.proj.weight" in tensors:
        if "blocks.0.ls1.gamma" in tensors and "mask_token" in tensors:
            return "DINOv2", _IMAGENET
        if "head.weight" in tensors:
            return "timm's names", None
        return "DINO, or timm's names without a classifier", _IMAGENET
    return ("torchvision's names", _IMAGENET) if "conv1.weight" in tensors else ("timm's names", None)


def _fitted(
    name: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of a backbone's state, in its types, and what had to be done for it."""
    heads = _HEADS | _classifiers(name)
    missing = [each for each in expected if each not in tensors and not each.endswith("num_batches_tracked")]
    unknown = [each for each in tensors if each not in expected and each.partition(".")[0] not in heads]
    if missing or unknown:
        raise CheckpointError(
            f"expected the tensors of backbone {name}, got weights that lack {_some(missing)} and have the unknown "
            f"{_some(unknown)}; {_STATE_BACKBONE}"
        )
    kept, split, counters, types = {}, 0, 0, set()
    for each, own in expected.items():
        if each not in tensors:
            kept[each] = torch.zeros_like(own)  # steps that a norm has counted: no weights, and older files lack them
            counters += 1
            continue
        value = tensors[each].detach()
        same_kind = value.is_floating_point() == own.is_floating_point()
        splits = len(value) // len(own) if same_kind and value.ndim == own.ndim == 1 else 1
        if splits > 1 and len(value) == splits * len(own) and each.endswith((".running_mean", ".running_var")):
            value = value.reshape(splits, -1).mean(0)  # lightly's SplitBatchNorm evaluates with the mean of its splits
            split += 1
        if value.shape != own.shape or not same_kind:
            raise CheckpointError(
                f"expected {each} of backbone {name} as {own.dtype} of shape {tuple(own.shape)}, got {value.dtype} of "
                f"{tuple(value.shape)}; {_STATE_BACKBONE}"
            )
        if value.dtype != own.dtype:
            types.add(str(value.dtype).removeprefix("torch."))
        kept[each] = value.to(own.dtype, copy=True, memory_format=torch.contiguous_format)
        if not kept[each].isfinite().all():
            raise CheckpointError(f"expected finite weights, got NaN or infinity in {each}; take another checkpoint")
    notes = []
    if types:
        notes.append(f"numbers of {', '.join(sorted(types))} became float32")
    if split:
        notes.append(f"{split} running statistics of lightly's SplitBatchNorm were averaged over its splits")
    if counters:
        notes.append(f"{counters} counters of norms (num_batches_tracked) were missing and are 0")
    return kept, notes


def _classifiers(name: str) -> set[str]:
    """The first parts of the names of a timm model's classifier."""
    named: Any = backbones.timm_config(name).classifier if name.startswith(backbones.TIMM) else None
    return {each.partition(".")[0] for each in ([named] if isinstance(named, str) else named or [])}


def _unknown(state: Mapping[str, Tensor], backbone: str | None) -> CheckpointError:
    wanted = f"weights of {backbone} in a layout" if backbone else "an encoder's weights in a layout"
    remedy = _STATE_BACKBONE if backbone is None else "name another, or rename the tensors as the backbone does"
    if any(name.startswith("features.") for name in state):
        remedy = (
            "of torchvision's networks ResNets and vision transformers are read: take timm's weights of the same one"
        )
    return CheckpointError(f"expected {wanted} of docs/weights.md, found tensors named {_some(state)}; {remedy}")


def _some(names: Iterable[str]) -> str:
    known = list(names)
    return (", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")) or "none"
