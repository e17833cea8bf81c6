"""An encoder comes back as it was saved, or not at all."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from deepclust import seeding
from deepclust.errors import CheckpointError, ConfigError, DataError
from deepclust.methods.pretrained import pretrained
from deepclust.models import encoder, features
from deepclust.models.features import to_float

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def small(backbone: str = "small") -> encoder.Encoder:
    with seeding.seeded(0):
        return encoder.Encoder(backbone=backbone, image_size=16, channels=1, mean=[0.3], std=[0.2]).eval()


def images(count: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)


def embed(net: torch.nn.Module, batch_size: int = 3) -> np.ndarray:
    return features.extract(net, images(), batch_size=batch_size, device=torch.device("cpu"))


def test_a_saved_encoder_embeds_as_before(tmp_path: Path) -> None:
    encoder.save(small(), tmp_path, method="random")
    again = encoder.load(tmp_path)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    np.testing.assert_array_equal(embed(again), embed(small()))


def test_pixels_are_the_normalised_image_row_by_row() -> None:
    found = embed(small("pixels"))
    np.testing.assert_allclose(found, ((images() / 255 - 0.3) / 0.2).reshape(7, -1), rtol=1e-5)


def test_features_keep_their_order_whatever_the_batch() -> None:
    np.testing.assert_allclose(embed(small(), 3), embed(small(), 7), atol=1e-5)


def test_features_that_are_not_finite_name_the_image() -> None:
    def broken(batch: torch.Tensor) -> torch.Tensor:
        return torch.where(
            batch.flatten(1)[:, :2] == to_float(torch.from_numpy(images()))[4].flatten()[:2], torch.nan, 1.0
        )

    with pytest.raises(DataError, match="image 4"):
        embed(broken)


@pytest.mark.parametrize(
    "damage", ["missing description", "missing weights", "truncated", "another backbone", "partial", "old description"]
)
def test_damaged_encoders_are_refused(tmp_path: Path, damage: str) -> None:
    encoder.save(small(), tmp_path)
    weights, description = tmp_path / encoder.WEIGHTS, tmp_path / encoder.DESCRIPTION
    if damage == "missing description":
        description.unlink()
    elif damage == "missing weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "another backbone":
        description.write_text(
            description.read_text().replace('"small"', '"resnet18"', 1).replace("null", '"small"', 1)
        )
    elif damage == "old description":
        values = json.loads(description.read_text())
        del values["stem"]
        description.write_text(json.dumps(values))
    else:
        save_file({k: v for k, v in load_file(weights).items() if "norm2" not in k}, weights)
    with pytest.raises(CheckpointError, match="pretrain stage"):
        encoder.load(tmp_path)


def test_seeded_initialisation_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first = small().state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, first[name]) for name, value in small().state_dict().items())


def original(name: str, **options: Any) -> nn.Module:
    """A classifier of torchvision or timm with weights and statistics unlike any fresh one."""
    with seeding.seeded(1):
        net = timm.create_model(name.removeprefix("timm/"), **options) if "/" in name else getattr(models, name)()
        for parameter in net.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    result: nn.Module = net.eval()
    return result


def write(path: Path, tensors: dict[str, torch.Tensor], prefix: str = "") -> dict[str, Any]:
    """A file of weights, and the parameters that name it."""
    save_file({prefix + name: value.contiguous() for name, value in tensors.items()}, path)
    return named(path)


def named(path: Path) -> dict[str, Any]:
    return {"weights": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def batch(channels: int, size: int = 32, count: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=seeding.generator("batch"))


def normalised(pictures: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    return torch.stack([(channel - m) / s for channel, m, s in zip(pictures.unbind(1), mean, std, strict=True)], dim=1)


def without_head(net: Any) -> nn.Module:
    if hasattr(net, "reset_classifier"):
        net.reset_classifier(0)
    else:
        net.fc = nn.Identity()
    result: nn.Module = net
    return result


@pytest.mark.parametrize(
    ("name", "mean", "std", "ignored"),
    [
        ("resnet18", MEAN, STD, ["fc.bias", "fc.weight"]),
        ("timm/test_resnet.r160_in1k", [0.5] * 3, [0.5] * 3, ["fc.bias", "fc.weight"]),
        ("timm/test_vit", [0.5] * 3, [0.5] * 3, ["head.bias", "head.weight"]),
        ("timm/test_convnext", [0.5] * 3, [0.5] * 3, ["head.fc.bias", "head.fc.weight"]),  # head.norm is no classifier
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "encoder."])
def test_given_weights_give_their_own_networks_features(
    tmp_path: Path, name: str, mean: list[float], std: list[float], ignored: list[str], prefix: str
) -> None:
    options = {"img_size": 32} if "vit" in name else {}
    net = original(name, **options)
    file = write(tmp_path / "weights.safetensors", net.state_dict(), prefix)
    found = pretrained(backbone=name, image_size=32, channels=3, **file)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert found.description["ignored"] == ignored
    assert (found.description["mean"], found.description["std"]) == (mean, std)
    with torch.no_grad():
        expected = without_head(net)(normalised(batch(3), mean, std))
    torch.testing.assert_close(found(batch(3)), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == (3, found.feature_dim)


@pytest.mark.parametrize("input_size", [None, 48])
def test_a_grey_image_is_repeated_for_a_network_of_three_channels(tmp_path: Path, input_size: int | None) -> None:
    file = write(tmp_path / "weights.safetensors", original("resnet18").state_dict())
    grey, colour = (
        pretrained(backbone="resnet18", image_size=28, channels=channels, input_size=input_size, **file)
        for channels in (1, 3)
    )
    assert (grey.description["channels"], grey.description["network_channels"]) == (1, 3)
    pictures = batch(1, 28)
    torch.testing.assert_close(grey(pictures), colour(torch.cat([pictures] * 3, dim=1)), rtol=1e-6, atol=1e-6)


def test_images_are_brought_to_the_size_that_the_network_gets(tmp_path: Path) -> None:
    net = original("timm/test_vit", img_size=48)
    file = write(tmp_path / "weights.safetensors", net.state_dict())
    found = pretrained(backbone="timm/test_vit", image_size=28, channels=3, input_size=48, **file)
    for size in (28, 60, 48):
        pictures = batch(3, size)
        resized = F.interpolate(pictures, (48, 48), mode="bilinear", antialias=True) if size != 48 else pictures
        with torch.no_grad():
            expected = without_head(net)(resized * 2 - 1)
        torch.testing.assert_close(found(pictures), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "image_size", "stem"), [(7, 28, "imagenet"), (3, 96, "small")], ids=["imagenet", "small"]
)
def test_the_stem_is_that_of_the_weights_whatever_the_images(
    tmp_path: Path, side: int, image_size: int, stem: str
) -> None:
    net: Any = without_head(original("resnet18"))
    if side == 3:
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    file = write(tmp_path / "weights.safetensors", net.state_dict())
    found = pretrained(backbone="resnet18", image_size=image_size, channels=3, **file)
    assert found.description["stem"] == stem
    assert found.description["ignored"] == []
    with torch.no_grad():
        expected = net(normalised(batch(3, image_size), MEAN, STD))
    torch.testing.assert_close(found(batch(3, image_size)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "timm/test_vit"])
def test_a_pretrained_encoder_comes_back_as_it_was_saved(tmp_path: Path, name: str) -> None:
    options = {"img_size": 48} if "vit" in name else {}
    file = write(tmp_path / "weights.safetensors", original(name, **options).state_dict())
    first = pretrained(backbone=name, image_size=28, channels=1, input_size=48, **file)
    encoder.save(first, tmp_path, method="pretrained")
    again = encoder.load(tmp_path)
    assert again.description == first.description
    assert torch.equal(again(batch(1, 28)), first(batch(1, 28)))


@pytest.mark.parametrize(("backbone", "stem"), [("resnet18", "imagenet"), ("small", "auto"), ("timm/test_vit", "auto")])
def test_an_encoder_saved_here_is_taken_with_its_own_normalisation(tmp_path: Path, backbone: str, stem: str) -> None:
    with seeding.seeded(0):
        first = encoder.Encoder(backbone=backbone, image_size=32, channels=1, mean=[0.3], std=[0.2], stem=stem).eval()
    encoder.save(first, tmp_path)
    second = pretrained(backbone=backbone, image_size=32, channels=1, **named(tmp_path / encoder.WEIGHTS))
    assert second.description == first.description | {"ignored": []}
    assert torch.equal(second(batch(1)), first(batch(1)))


def test_an_encoders_file_is_the_same_each_time_it_is_written(tmp_path: Path) -> None:
    found = []
    for _ in range(3):
        encoder.save(small(), tmp_path)
        found.append((tmp_path / encoder.WEIGHTS).read_bytes())
    assert found[0] == found[1] == found[2]


def test_stated_statistics_go_before_the_usual_ones(tmp_path: Path) -> None:
    file = write(tmp_path / "weights.safetensors", original("resnet18").state_dict())
    found = pretrained(backbone="resnet18", image_size=28, channels=1, mean=[0.1, 0.2, 0.3], **file)
    assert (found.description["mean"], found.description["std"]) == ([0.1, 0.2, 0.3], STD)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: t.pop("layer1.0.conv1.weight"),
            CheckpointError,
            r"lacks layer1.0.conv1.weight and.*state the backb",
        ),
        (
            lambda t: t.update({"module.bn1.bias": t.pop("bn1.bias")}),
            CheckpointError,
            r"lacks bn1.bias and has the unknown module.bn1.bias",
        ),
        (lambda t: t.pop("conv1.weight"), CheckpointError, r"expected weights of resnet18 with a convolution conv1"),
        (
            lambda t: t.update({f"queue{i}": torch.zeros(2) for i in range(5)}),
            CheckpointError,
            r"lacks nothing and has the unknown queue0, queue1, queue2 and 2 more; state",
        ),
        (
            lambda t: t.update({"bn1.weight": torch.zeros(3)}),
            CheckpointError,
            r"bn1.weight of shape \(64,\).*got \(3,\)",
        ),
        (
            lambda t: t.update({"conv1.weight": torch.zeros(64, 3, 5, 5)}),
            CheckpointError,
            r"3×3 or 7×7 in .*, got 5×5; take",
        ),
        (
            lambda t: t.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            ConfigError,
            r"images of 1 channel\(s\), as the network takes, or grey ones; got 3 channels; make the images grey",
        ),
    ],
)
def test_weights_that_are_not_exactly_the_backbones_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], error: type[Exception], message: str
) -> None:
    tensors = dict(original("resnet18").state_dict())
    change(tensors)
    file = write(tmp_path / "weights.safetensors", tensors)
    with pytest.raises(error, match=message) as caught:
        pretrained(backbone="resnet18", image_size=32, channels=3, **file)
    assert "\n" not in str(caught.value)


def test_files_without_the_steps_counted_by_norms_are_whole(tmp_path: Path) -> None:
    tensors = {name: value for name, value in original("resnet18").state_dict().items() if "num_batches" not in name}
    file = write(tmp_path / "weights.safetensors", tensors)
    assert pretrained(backbone="resnet18", image_size=32, channels=3, **file).description["ignored"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"sha256": None},
            ConfigError,
            r"^sha256: expected the SHA-256 of .*, (?P<found>[0-9a-f]{64}); got None; state",
        ),
        ({"sha256": "0" * 64}, ConfigError, r"^sha256: .*, (?P<found>[0-9a-f]{64}); got 000"),
        ({"weights": "{folder}/none.safetensors"}, CheckpointError, r"can not read it \(No such file or directory\)"),
        (
            {"weights": "net.pth"},
            ConfigError,
            r"expected a .safetensors file or timm, got 'net.pth'; .*save_file\(state",
        ),
        ({"backbone": "pixels"}, ConfigError, r"^backbone: expected one that has weights"),
        ({"mean": [0.5]}, ConfigError, r"mean and std of the network's 3 channel\(s\), got 1 and 3 numbers"),
        ({"weights": "timm"}, ConfigError, r"^sha256: expected null with weights: timm"),
        (
            {"weights": "timm", "sha256": None},
            ConfigError,
            r"^backbone: expected timm/NAME.TAG with weights: timm, got 'r",
        ),
        (
            {"weights": "timm", "sha256": None, "backbone": "timm/test_vit"},
            ConfigError,
            r"expected timm/NAME.TAG with published weights.*known: timm/test_vit.r160_in1k",
        ),
    ],
)
def test_what_is_at_odds_with_the_weights_is_named(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    file = write(tmp_path / "weights.safetensors", original("resnet18").state_dict())
    asked: dict[str, Any] = {"backbone": "resnet18", "image_size": 32, "channels": 3} | file | options
    asked["weights"] = asked["weights"].format(folder=tmp_path)
    with pytest.raises(error, match=message) as caught:
        pretrained(**asked)
    assert "\n" not in str(caught.value)
    assert "found>" not in message or file["sha256"] in str(caught.value)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write(path, {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"weights .* are damaged"):
        pretrained(backbone="resnet18", image_size=32, channels=3, **named(path))


def test_small_weights_from_elsewhere_need_their_normalisation_stated(tmp_path: Path) -> None:
    file = write(tmp_path / "weights.safetensors", small().state_dict())
    with pytest.raises(ConfigError, match="mean, std: expected those that the weights of small were trained with"):
        pretrained(backbone="small", image_size=16, channels=1, **file)
    found = pretrained(backbone="small", image_size=16, channels=1, mean=[0.3], std=[0.2], **file)
    np.testing.assert_array_equal(embed(found), embed(small()))


def test_a_transformers_weights_of_another_size_name_the_remedy(tmp_path: Path) -> None:
    file = write(tmp_path / "weights.safetensors", original("timm/test_vit", img_size=160).state_dict())
    with pytest.raises(CheckpointError, match=r"expected pos_embed of shape .*as input_size the size that they were"):
        pretrained(backbone="timm/test_vit", image_size=32, channels=3, **file)
    pretrained(backbone="timm/test_vit", image_size=32, channels=3, input_size=160, **file)


def test_timms_published_weights_are_taken_without_their_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    net = original("timm/test_vit")
    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", lambda *place: dict(net.state_dict()))
    found = pretrained(
        backbone="timm/test_vit.r160_in1k", weights="timm", sha256=None, image_size=32, channels=1, input_size=160
    )
    assert found.description["ignored"] == ["head.bias", "head.weight"]
    assert (found.description["mean"], found.description["network_channels"]) == ([0.5] * 3, 3)
    pictures = batch(1, 160)
    with torch.no_grad():
        expected = without_head(net)((pictures * 2 - 1).repeat(1, 3, 1, 1))
    torch.testing.assert_close(found(pictures), expected, rtol=1e-5, atol=1e-5)
