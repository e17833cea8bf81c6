"""A file in each layout, written from networks built here, becomes an encoder that computes what the network does."""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torchvision import models

from deepclust import conversion, seeding
from deepclust.errors import CheckpointError, ConfigError
from tests.deepclust import networks

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
SWAV = {"mean": [0.485, 0.456, 0.406], "std": [0.228, 0.224, 0.225]}
SIDE = 32
State = dict[str, Any]


def drawn(net: nn.Module) -> nn.Module:
    """The network with all its weights and statistics drawn at random, none like another or like a fresh one's."""
    generator = seeding.generator("weights")
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                around = 1.0 if name.endswith(("running_var", "gamma")) or value.ndim == 1 else 0.0
                value.copy_(around + (0.1 if value.ndim == 1 else value[0].numel() ** -0.5) * noise)
    return net.eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    net = models.resnet18()
    net.fc = nn.Identity()
    return drawn(net)


def small(channels: int = 3, padding: int = 1) -> nn.Module:
    net = models.resnet18()
    net.fc, net.maxpool = nn.Identity(), nn.Identity()
    net.conv1 = nn.Conv2d(channels, 64, 3, 1, padding, bias=False)
    return drawn(net)


def copies(prefix: str, net: nn.Module) -> State:
    """The beginning of another net's state, which must not be taken for the first's."""
    return {name: value + 1 for name, value in list(under(prefix, net).items())[:9]}


def under(prefix: str, net: nn.Module) -> State:
    return {f"{prefix}{name}": value for name, value in net.state_dict().items()}


def images(channels: int = 3, side: int = SIDE) -> Tensor:
    return torch.randn(2, channels, side, side, generator=seeding.generator("images"))


def converted(saved: Any, folder: Path, backbone: str | None = None) -> tuple[conversion.Converted, nn.Module]:
    """What is found in a file of this content, and the backbone, which the file made of it was loaded into."""
    torch.save(saved, folder / "original.pth")
    found = conversion.convert(conversion.read(folder / "original.pth"), backbone)
    conversion.save(found, folder / "weights.safetensors")
    with safe_open(folder / "weights.safetensors", framework="pt") as opened:
        stated = json.loads(opened.metadata()["deepclust"])
    assert stated == found.description
    return found, found.network.eval()


@torch.inference_mode()
def same(net: nn.Module, original: nn.Module, x: Tensor, border: int = 0) -> bool:
    """Whether the network gives the original's features of images, which it gets with a border of zeros."""
    wanted = copy.deepcopy(original).double()(x.double()).flatten(1)
    found = net.double()(F.pad(x.double(), [border] * 4))
    assert wanted.std() > 1e-3 * wanted.abs().max(), "features that say nothing"
    return bool((found - wanted).abs().max() <= 1e-6 * wanted.abs().max())


def moco(net: nn.Module) -> State:
    other = copies("module.encoder_k.", net)
    heads = {
        f"module.encoder_{each}.fc.{layer}": torch.ones(2, 2) for each in "qk" for layer in ("0.weight", "2.weight")
    }
    queue = {"module.queue": torch.zeros(2, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    state = under("module.encoder_q.", net) | other | heads | queue
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def moco_v3(net: nn.Module) -> State:
    other = copies("module.momentum_encoder.", net)
    heads = {"module.base_encoder.fc.0.weight": torch.ones(2, 2), "module.predictor.0.weight": torch.ones(2, 2)}
    return {"epoch": 300, "arch": "resnet18", "state_dict": under("module.base_encoder.", net) | other | heads}


def simsiam(net: nn.Module) -> State:
    heads = {"module.encoder.fc.0.weight": torch.ones(2, 2), "module.predictor.0.weight": torch.ones(2, 2)}
    return {"epoch": 100, "arch": "resnet18", "state_dict": under("module.encoder.", net) | heads}


def swav(net: nn.Module) -> State:
    heads = ("projection_head.0.weight", "projection_head.1.running_mean", "prototypes.weight")
    return under("module.", net) | {f"module.{name}": torch.ones(2, 2) for name in heads}


def dino(net: nn.Module) -> State:
    teacher = under("module.backbone.", net) | {"module.head.mlp.0.weight": torch.ones(2, 2)}
    student = copies("module.backbone.", net)
    return {"student": student, "teacher": teacher, "epoch": 100, "dino_loss": {"center": torch.zeros(1, 2)}}


def solo_learn(net: nn.Module) -> State:
    other = copies("momentum_backbone.", net)
    heads = {f"{name}.weight": torch.ones(2, 2) for name in ("classifier", "projector.0", "momentum_projector.0")}
    return {
        "epoch": 400,
        "global_step": 10,
        "pytorch-lightning_version": "2.0.2",
        "state_dict": under("backbone.", net) | other | heads,
        "callbacks": {},
        "optimizer_states": [],
    }


def lightly(net: nn.Module) -> State:
    layers = nn.Sequential(*list(net.children())[:-1])
    heads = {"projection_head.layers.0.weight": torch.ones(2, 2), "prototypes.heads.0.weight": torch.ones(2, 2)}
    other = copies("backbone_momentum.", layers)
    return {"pytorch-lightning_version": "2.0.2", "state_dict": under("backbone.", layers) | heads | other}


RESNETS: dict[str, tuple[Callable[[nn.Module], State], str, dict[str, Any], set[str]]] = {
    "torchvision": (
        lambda net: net.state_dict() | {"fc.weight": torch.ones(9, 512)},
        "torchvision's names",
        IMAGENET,
        {"fc"},
    ),
    "MoCo": (
        moco,
        "MoCo v1, v2 or PCL, the query encoder",
        IMAGENET,
        {"encoder_q.fc", "encoder_k", "queue", "queue_ptr"},
    ),
    "MoCo v3": (moco_v3, "MoCo v3, the base encoder", IMAGENET, {"base_encoder.fc", "momentum_encoder", "predictor"}),
    "SimSiam": (simsiam, "SimSiam, the encoder", IMAGENET, {"encoder.fc", "predictor"}),
    "SwAV": (swav, "SwAV or DeepCluster-v2", SWAV, {"projection_head", "prototypes"}),
    "SwAV in training": (
        lambda net: {"epoch": 9, "state_dict": swav(net), "amp": {}},
        "SwAV or DeepCluster-v2",
        SWAV,
        {"projection_head", "prototypes"},
    ),
    "DINO": (dino, "DINO or DINOv2, the teacher", IMAGENET, {"head", "student", "dino_loss"}),
    "solo-learn": (
        solo_learn,
        "solo-learn, or lightly with a ResNet's names",
        {},
        {"classifier", "projector", "momentum_backbone", "momentum_projector"},
    ),
    "solo-learn's earlier names": (
        lambda net: {"state_dict": under("encoder.", net) | copies("momentum_encoder.", net)},
        "solo-learn, or lightly with a ResNet's names",
        {},
        {"momentum_encoder"},
    ),
    "lightly's DINO": (
        lambda net: {"state_dict": under("teacher_backbone.", net) | copies("student_backbone.", net)},
        "lightly's DINO, the teacher",
        {},
        {"student_backbone"},
    ),
    "lightly": (
        lightly,
        "lightly, a ResNet's layers by number",
        {},
        {"projection_head", "prototypes", "backbone_momentum"},
    ),
}


@pytest.mark.parametrize("layout", RESNETS)
def test_a_resnet_in_a_layout_of_others_gives_the_same_features(layout: str, resnet: nn.Module, tmp_path: Path) -> None:
    write, words, statistics, left_out = RESNETS[layout]
    found, net = converted(write(resnet), tmp_path)
    assert found.layout == words
    assert found.description == {"backbone": "resnet18", **statistics, **({"input_size": 224} if statistics else {})}
    assert set(found.left_out) == left_out
    assert found.tensors.keys() == resnet.state_dict().keys()
    assert same(net, resnet, images())


def test_a_file_in_the_format_before_torch_1_6_is_read(resnet: nn.Module, tmp_path: Path) -> None:
    torch.save(moco(resnet), tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    tensors = conversion.convert(conversion.read(tmp_path / "old.pth.tar")).tensors
    assert all(torch.equal(value, tensors[name]) for name, value in resnet.state_dict().items())


def test_solo_learns_small_stem_gives_the_same_features_of_images_with_its_wider_border(tmp_path: Path) -> None:
    original = small(padding=2)
    found, net = converted(solo_learn(original), tmp_path)
    assert found.description == {"backbone": "resnet18"}
    assert any("pads by 2 pixels" in note for note in found.notes)
    assert any("does not tell mean and std" in note for note in found.notes)
    assert same(net, original, images(), border=1)


def test_a_grey_net_with_a_small_stem_in_data_parallel_is_recognised(tmp_path: Path) -> None:
    original = small(channels=1)
    found, net = converted({"model": under("module.", original)}, tmp_path)
    assert found.description == {"backbone": "resnet18"}, "nothing tells on what it was trained"
    assert same(net, original, images(channels=1))


def test_lightlys_resnet_with_split_norms_gives_the_same_features(tmp_path: Path) -> None:
    original = drawn(networks.LightlyResNet18())
    found, net = converted(original.state_dict(), tmp_path)
    assert (found.layout, found.left_out) == ("lightly's ResNetGenerator", {"linear": 2})
    assert any("SplitBatchNorm" in note for note in found.notes)
    assert same(net, original, images())


def test_lightlys_resnet_in_a_sequential_is_refused_as_it_lacks_an_activation(tmp_path: Path) -> None:
    original = nn.Sequential(*list(networks.LightlyResNet18().children())[:-1])
    with pytest.raises(CheckpointError, match=r"got lightly's ResNetGenerator in an nn\.Sequential, which leaves out"):
        conversion.convert(under("backbone.", original))


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_deeper_resnets_are_told_apart(name: str) -> None:
    state = getattr(models, name)().state_dict()
    assert conversion.convert(state).description["backbone"] == name


def vit(**options: Any) -> nn.Module:
    return drawn(networks.VisionTransformer(192, 3, 16, SIDE, **options))


def test_dinos_vision_transformer_gives_the_same_features_as_released_and_as_trained(tmp_path: Path) -> None:
    original = vit()
    stated = {"backbone": "timm/vit_tiny_patch16_224", "input_size": SIDE, **IMAGENET}
    for saved, words in [
        (original.state_dict(), "DINO, or timm's names without a classifier"),
        (dino(original), "DINO or DINOv2, the teacher"),
    ]:
        found, net = converted(saved, tmp_path)
        assert (found.layout, found.description) == (words, stated)
        assert same(net, original, images())


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2s_vision_transformer_gives_the_same_features_with_and_without_registers(
    registers: int, tmp_path: Path
) -> None:
    original = drawn(networks.VisionTransformer(384, 6, 14, 28, v2=True, registers=registers))
    found, net = converted(original.state_dict(), tmp_path)
    backbone = f"timm/vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    assert found.description == {"backbone": backbone, "input_size": 28, **IMAGENET}
    assert (found.layout, found.left_out) == ("DINOv2", {"mask_token": 1})
    assert same(net, original, images(side=28))
    in_training = {
        re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", name): value for name, value in original.state_dict().items()
    }
    teacher = {f"backbone.{name}": value for name, value in in_training.items()} | {
        "dino_head.mlp.0.bias": torch.ones(2)
    }
    again = conversion.convert({"teacher": teacher, "iteration": 9})
    assert again.description == found.description
    assert all(torch.equal(value, again.tensors[name]) for name, value in found.tensors.items())


def test_torchvisions_vision_transformer_gives_the_same_features(tmp_path: Path) -> None:
    original = drawn(models.VisionTransformer(SIDE, 16, 12, 3, 192, 768))
    saved = original.state_dict()
    original.heads = nn.Identity()
    found, net = converted(saved, tmp_path)
    assert found.layout == "torchvision's vision transformer"
    assert found.description == {"backbone": "timm/vit_tiny_patch16_224", "input_size": SIDE, **IMAGENET}
    assert found.left_out == {"heads": 2}
    assert same(net, original, images())


def test_timms_averaged_weights_come_first_and_the_name_in_the_file_says_of_which_model(tmp_path: Path) -> None:
    original = drawn(timm.create_model("resnet10t", num_classes=7))
    averaged = original.state_dict()
    other = {name: value + 1 for name, value in averaged.items()}
    saved = {"epoch": 1, "arch": "resnet10t", "state_dict": other, "state_dict_ema": averaged}
    found, net = converted(saved, tmp_path)
    original.fc = nn.Identity()
    assert found.description == {"backbone": "timm/resnet10t"}
    assert found.left_out == {"fc": 2, "state_dict": len(other)}
    assert same(net, original, images())


def test_a_stated_backbone_is_taken_where_nothing_else_says_it(tmp_path: Path) -> None:
    original = drawn(timm.create_model("convnext_atto", num_classes=3))
    with pytest.raises(CheckpointError, match=r"found tensors named stem\.0\.weight, .* more; name the backbone"):
        conversion.convert(original.state_dict())
    found, net = converted(original.state_dict(), tmp_path, "timm/convnext_atto")
    original.reset_classifier(0)
    assert found.left_out == {"head": 2}
    assert same(net, original, images())


def test_small_transformers_of_moco_v3_are_refused_as_they_have_more_heads_than_timms() -> None:
    original = vit()
    original.pos_embed.data[0, 0] = 0  # its positions are sines, and the class token has none
    saved = {"state_dict": under("module.base_encoder.", original)}
    with pytest.raises(
        CheckpointError, match=r"^expected 3 heads, as timm's vit_tiny has, got a vision transformer of MoCo v3, "
    ):
        conversion.convert(saved)
    assert conversion.convert(saved, "timm/vit_tiny_patch16_224").description["backbone"] == "timm/vit_tiny_patch16_224"


def test_the_weights_are_float32_on_their_own_storage_whatever_the_file_holds(
    resnet: nn.Module, tmp_path: Path
) -> None:
    state = resnet.state_dict()
    converted(state, tmp_path)
    written = (tmp_path / "weights.safetensors").read_bytes()
    rows = torch.cat([value.flatten().double() for value in state.values() if value.is_floating_point()])
    shared, start = {}, 0
    for name, value in state.items():
        if value.is_floating_point():  # all on one storage, and in other strides
            shared[name] = rows[start : start + value.numel()].view(value.shape)
            start += value.numel()
            if value.ndim == 4:
                shared[name] = shared[name].contiguous(memory_format=torch.channels_last)
    found, _ = converted(shared, tmp_path)
    assert (tmp_path / "weights.safetensors").read_bytes() == written
    assert found.notes == [
        "numbers of float64 became float32",
        "20 counters of norms (num_batches_tracked) were missing and are 0",
    ]
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    found = conversion.convert(halves)
    assert found.tensors["conv1.weight"].equal(state["conv1.weight"].half().float())
    assert found.notes == ["numbers of float16 became float32"]


def edited(state: State, **edits: Any) -> State:
    """With some tensors in place of others; None: without."""
    edits = {name.replace("__", "."): value for name, value in edits.items()}
    return {name: value for name, value in {**state, **edits}.items() if value is not None}


def test_weights_that_do_not_fit_are_named(resnet: nn.Module) -> None:
    state = resnet.state_dict()
    bias = state["bn1.bias"]
    for edits, message in [
        ({"bn1__bias": None}, r"lack bn1\.bias and have the unknown none; name the backbone"),
        ({"layer1__0__se": torch.ones(1)}, r"lack none and have the unknown layer1\.0\.se; name the backbone"),
        ({"bn1__bias": torch.ones(65)}, r"bn1\.bias of backbone resnet18 as torch\.float32 of shape \(64,\), got .*65"),
        (
            {"bn1__bias": bias.long()},
            r"bn1\.bias of backbone resnet18 as torch\.float32 .* got torch\.int64 of \(64,\)",
        ),
        ({"bn1__bias": bias.clone().fill_(torch.nan)}, r"finite weights, got NaN or infinity in bn1\.bias"),
        ({"bn1__bias": bias.double() + 1e300}, r"finite weights, got NaN or infinity in bn1\.bias"),
        ({"bn1__bias": bias.to_sparse()}, r"plain numbers in bn1\.bias, got a sparse"),
        ({"bn1__bias": bias.to("meta")}, r"plain numbers in bn1\.bias, got a sparse, quantised or empty"),
        (
            {"conv1__weight": torch.ones(64, 3, 5, 5)},
            r"3×3 or 7×7 for 1 or 3 channels, got .*\(64, 3, 5, 5\); name the",
        ),
        (
            {"conv1__weight": torch.ones(64, 4, 7, 7)},
            r"3×3 or 7×7 for 1 or 3 channels, got .*\(64, 4, 7, 7\); name the",
        ),
        ({"conv1__weight": None}, r"found tensors named bn1\.weight, bn1\.bias, bn1\.running_mean and 116 more; name"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            conversion.convert(edited(state, **edits))
    with pytest.raises(
        CheckpointError, match=r"expected the tensors of backbone resnet50, got weights that lack layer1"
    ):
        conversion.convert(state, "resnet50")
    with pytest.raises(CheckpointError, match=r"expected weights of timm/vit_tiny_patch16_224 in a layout of docs"):
        conversion.convert(state, "timm/vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=r"^backbone: expected one of pixels, small.*; got 'resnet19'$"):
        conversion.convert(state, "resnet19")
    with pytest.raises(CheckpointError, match=r"of torchvision's networks ResNets and vision transformers are read"):
        conversion.convert({"features.0.0.weight": torch.ones(1)})


@pytest.mark.parametrize(
    "content", [torch.ones(2), [torch.ones(2)], {}, {"state_dict": {}}, {"epoch": 3}, {0: torch.ones(1)}, "text", None]
)
def test_a_file_without_tensors_by_name_is_refused(content: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^expected tensors by name, as state_dict\(\) gives, found none; "):
        conversion.convert(content)


def test_a_state_that_holds_itself_ends() -> None:
    loop: dict[str, Any] = {}
    loop["state_dict"] = loop
    with pytest.raises(CheckpointError, match="found none"):
        conversion.convert(loop)


def _zip(folder: Path) -> bytes:
    torch.save({"a": torch.ones(100)}, folder / "whole.pth")
    return (folder / "whole.pth").read_bytes()


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"PK\x03\x04 more", b"\x80\x02K\x01.", b"\x80\x04\x95\x00", lambda folder: _zip(folder)[:400]],
)
def test_what_is_no_torch_file_is_refused_in_one_line(
    content: bytes | Callable[[Path], bytes], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content if isinstance(content, bytes) else content(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"^expected a file of torch\.save in .*a\.pth, got a damaged one or another"
    ):
        conversion.read(path)
    assert not recwarn.list


def test_objects_are_never_made_and_the_class_that_a_file_wanted_is_named(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(lr=1), "state_dict": {}}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"a\.pth holds more than weights, an object of argparse\.Namespace, .*save"
    ):
        conversion.read(tmp_path / "a.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"an object of torch\.nn\.modules\.linear\.Linear"):
        conversion.read(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(b"cos\nsystem\n(S'touch made'\ntR.")
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        conversion.read(tmp_path / "a.pth")
    for path, message in [(tmp_path / "none.pth", "found none"), (tmp_path, "found no regular file")]:
        with pytest.raises(CheckpointError, match=message):
            conversion.read(path)
