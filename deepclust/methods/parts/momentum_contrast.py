"""Queries, keys of a momentum encoder and their queue: what MoCo (arXiv 1911.05722) is, and PCL builds on.

B batch, D dimension of the embeddings, R keys in the queue.
"""

from __future__ import annotations

import copy
import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import distributed
from deepclust.config import Auto, Count, Positive, Share, config
from deepclust.errors import ConfigError
from deepclust.methods.parts import base, heads, options, sizes
from deepclust.methods.parts.queue import Queue


def info_nce(queries_BD: Tensor, keys_BD: Tensor, queue_RD: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of each query with its own key against the queue (equation 1). Rows of unit length."""
    positive = (queries_BD * keys_BD).sum(1, keepdim=True)
    logits = torch.cat([positive, heads.products(queries_BD, queue_RD)], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


@config
class MomentumConfig(options.TrainedConfig):
    """What MoCo and PCL share."""

    key_momentum: Share = 0.999
    """Momentum m of the momentum encoder."""
    key_groups: Count = 8
    """Groups that the shuffled keys go through the momentum encoder in, so that batch normalisation does not leak which
    query is whose key; 1: all together."""
    queue_length: Count | Auto = "auto"
    """Keys that are kept as negatives, R; auto: see docs/methods/sizes.md."""
    temperature: Positive = 0.2
    """Temperature τ of InfoNCE."""

    def sized(self, *, images: int, image_size: int) -> Self:
        """See the base class."""
        super().sized(images=images, image_size=image_size)
        if self.queue_length != "auto":
            return self
        return self.replaced(queue_length=sizes.key_queue(images, self.batch_size))

    def _check(self) -> None:
        super()._check()
        self._check_two_crops()
        self._check_queue(self.queue_length)
        if self.part < 2 * self.key_groups:
            raise ValueError(
                f"key_groups {self.key_groups} need at least two images each, got {self.part} images at once; "
                f"lower key_groups to at most {self.part // 2}, or raise batch_size"
            )


class MomentumContrast(base.Method):
    """A query encoder, its momentum encoder and the queue of keys; the loss is the method's.

    Args:
        backbone: Images to features.
        feature_dim: Dimension of the features.
        config: The options; without `auto`, see `MomentumConfig.sized`.
    """

    config: MomentumConfig

    def __init__(self, backbone: nn.Module, feature_dim: int, config: MomentumConfig) -> None:
        super().__init__(backbone, config)
        assert config.queue_length != "auto"
        self.head = heads.projection(feature_dim, config.hidden_dim, config.dim)
        # Its batch normalisation keeps statistics of its own.
        self.key_encoder = nn.Sequential(copy.deepcopy(self.backbone), copy.deepcopy(self.head)).requires_grad_(False)
        self.queue = Queue(config.queue_length, config.dim)
        self._new: list[Tensor] = []  # keys (B, D) that enter the queue after the step

    def before_step(self, step: int) -> None:
        """Forget keys of a step that came to no update."""
        self._new.clear()

    def contrast(self, views: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Queries (B, D) of the first view, their InfoNCE with the keys of the second, and what is to be logged."""
        query_view, key_view = views
        queries = heads.unit_rows(self.head(self.backbone(query_view)))
        keys = self._keys(key_view, generator)
        self._new.append(keys)
        instance = info_nce(queries, keys, self.queue.rows, temperature=self.config.temperature)
        value = instance.detach()
        return (
            queries,
            instance,
            {
                "info_nce": value,
                "loss_to_chance": value / math.log(1 + len(self.queue.rows)),
                "embedding_spread": base.spread(queries),
            },
        )

    @torch.no_grad()
    def _keys(self, view: Tensor, generator: torch.Generator) -> Tensor:
        if self.config.key_groups == 1:
            return heads.unit_rows(self.key_encoder(view))
        count = len(view) * distributed.processes()
        if count < 2 * self.config.key_groups:
            raise ConfigError(
                f"key_groups: expected at most {max(1, count // 2)}, half of the {count} images that go "
                f"through the network at once; got {self.config.key_groups}; lower it or enlarge the batch"
            )
        # A group has members on any process, whose batch normalisation is synchronised: so no image has to travel.
        order = torch.randperm(count, generator=generator) - distributed.rank() * len(view)
        groups = [
            group[(group >= 0) & (group < len(view))].to(view.device, non_blocking=True)
            for group in order.tensor_split(self.config.key_groups)
        ]
        keys = torch.cat([self.key_encoder(view[group]) for group in groups])
        return heads.unit_rows(keys[torch.cat(groups).argsort()])

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the momentum encoder, then put the step's keys into the queue in place of the oldest."""
        keys: list[Tensor] = list(self.key_encoder.parameters())
        queries: list[Tensor] = [*self.backbone.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(keys, queries, 1 - self.config.key_momentum)
        self.queue.push(torch.cat([distributed.gather(new) for new in self._new]))
        self._new.clear()
