"""Networks as other projects publish them, written from their definitions: what a converted encoder has to compute."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Of DINO (facebookresearch/dino, vision_transformer.py); with layer scale, of DINOv2."""

    def __init__(self, width: int, heads: int, *, scale: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width) if scale else nn.Identity()
        self.ls2 = LayerScale(width) if scale else nn.Identity()
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Of DINO; with layer scale, mask token and, where there are some, registers, of DINOv2. Gives the class token."""

    def __init__(self, width: int, heads: int, patch: int, side: int, *, v2: bool = False, registers: int = 0) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        if v2:
            self.mask_token = nn.Parameter(torch.zeros(1, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.blocks = nn.ModuleList([Block(width, heads, scale=v2) for _ in range(12)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        if hasattr(self, "register_tokens"):
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class SplitBatchNorm(nn.BatchNorm2d):
    """Of lightly: statistics of its own for each split of a batch, of which the mean evaluates."""

    def __init__(self, width: int, splits: int) -> None:
        super().__init__(width)
        self.splits = splits
        self.register_buffer("running_mean", torch.zeros(width * splits))
        self.register_buffer("running_var", torch.ones(width * splits))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (each.view(self.splits, -1).mean(0) for each in (self.running_mean, self.running_var))
        return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)


class LightlyBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, splits: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = SplitBatchNorm(outputs, splits)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = SplitBatchNorm(outputs, splits)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), SplitBatchNorm(outputs, splits)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class LightlyResNet18(nn.Module):
    """lightly.models.ResNetGenerator("resnet-18", num_splits=splits), up to its features."""

    def __init__(self, splits: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = SplitBatchNorm(64, splits)
        widths = [64, 64, 128, 256, 512]
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), start=1):
            first = LightlyBlock(inputs, outputs, 1 if number == 1 else 2, splits)
            setattr(self, f"layer{number}", nn.Sequential(first, LightlyBlock(outputs, outputs, 1, splits)))
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.avg_pool2d(self.layer4(self.layer3(self.layer2(self.layer1(x)))), 4).flatten(1)
