"""A transformer's features as its class token, the mean of its patch tokens, or both.

The tokens are those that timm's `forward_features` gives, prefix tokens (class, registers) first; `fc_norm` is the norm
that some of timm's networks apply behind their pooling, and without weights in the others. So no tensor gets another
name, and `cls` or `mean` is what timm's own `global_pool` of token or avg would give with the same weights.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepclust.errors import ConfigError

Pooling = Literal["auto", "cls", "mean", "cls+mean"]  # auto: the network's own


def pooled(net: nn.Module, images: Tensor, pooling: Pooling) -> Tensor:
    """Features (batch, dim) of images (batch, channels, height, width); dim is twice a token's with `cls+mean`."""
    if pooling == "auto":
        features: Tensor = net(images)
        return features
    vit: Any = net
    tokens_BND: Tensor = vit.forward_features(images)
    parts = {"cls": tokens_BND[:, 0], "mean": tokens_BND[:, vit.num_prefix_tokens :].mean(dim=1)}
    norm = getattr(vit, "fc_norm", nn.Identity())
    return torch.cat([norm(parts[part]) for part in pooling.split("+")], dim=1)


def dimension(net: nn.Module, name: str, pooling: Pooling) -> int:
    """Dimension of a network's features with a pooling other than auto.

    Raises:
        ConfigError: If the network has no tokens for this pooling.
    """
    vit: Any = net
    if not hasattr(vit, "num_prefix_tokens"):
        raise ConfigError(f"pooling: expected auto, as {name} is no transformer with such tokens; got {pooling!r}")
    if "cls" in pooling and getattr(vit, "cls_token", None) is None:
        raise ConfigError(f"pooling: expected auto or mean, as {name} has no class token; got {pooling!r}")
    return len(pooling.split("+")) * int(vit.num_features)
