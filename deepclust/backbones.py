"""Backbones by name: module and feature dimension.

`small` is made for two CPU cores and images of 16 to 64 pixels: a stride-2 4×4 stem, then residual blocks of 32, 64 and
128 channels. The ResNets (arXiv 1512.03385) are torchvision's; images of at most 64 pixels get the usual small-image
stem, a 3×3 convolution of stride 1 and no pooling (SimCLR, arXiv 2002.05709, appendix B.9).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from deepclust.errors import ConfigError

SMALL_IMAGE = 64
_RESNETS = ("resnet18", "resnet34", "resnet50")


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


def _small(channels: int, image_size: int) -> tuple[nn.Module, int]:
    return (
        nn.Sequential(
            nn.Conv2d(channels, 32, 4, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            ResidualBlock(32, 32, 1),
            ResidualBlock(32, 64, 2),
            ResidualBlock(64, 128, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        128,
    )


def _pixels(channels: int, image_size: int) -> tuple[nn.Module, int]:
    return nn.Flatten(), channels * image_size**2


def _resnet(name: str) -> Callable[[int, int], tuple[nn.Module, int]]:
    def build_resnet(channels: int, image_size: int) -> tuple[nn.Module, int]:
        from torchvision import models

        net = getattr(models, name)(weights=None)
        dim: int = net.fc.in_features
        net.fc = nn.Identity()
        if image_size <= SMALL_IMAGE:
            net.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
            net.maxpool = nn.Identity()
        elif channels != 3:
            net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        return net, dim

    return build_resnet


BACKBONES: dict[str, Callable[[int, int], tuple[nn.Module, int]]] = {
    "pixels": _pixels,
    "small": _small,
    **{name: _resnet(name) for name in _RESNETS},
}


def build(name: str, *, channels: int, image_size: int) -> tuple[nn.Module, int]:
    """A freshly initialised backbone.

    Args:
        name: A key of `BACKBONES`.
        channels: Channels of the images.
        image_size: Side of the images in pixels; decides a ResNet's stem and the dimension of `pixels`.

    Returns:
        The module, images (batch, channels, height, width) to features (batch, dim), and dim.

    Raises:
        ConfigError: If there is no backbone of that name.
    """
    if name not in BACKBONES:
        raise ConfigError(f"pretrain.shared.backbone: expected one of {', '.join(BACKBONES)}; got {name!r}")
    return BACKBONES[name](channels, image_size)


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
