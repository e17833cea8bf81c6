"""Prototypical Contrastive Learning of Unsupervised Representations (PCL), arXiv 2005.04966.

Differences from the original code, all deliberate:
- A cluster is one column of the prototype logits, also when several samples of the batch share it; the original repeats
  the column, so that a sample's own prototype counts among its negatives.
- Negatives are drawn for the whole batch by one vectorised draw, not by loops over samples.
- The keys go through the network in shuffled groups, so that batch normalisation does not leak which query is whose key
  (MoCo, arXiv 1911.05722, section 3.3); the original shuffles over GPUs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import heads, kmeans
from deepclust.errors import ConfigError
from deepclust.methods import base

_KEY_GROUPS = 4  # of the shuffled keys; four groups of 64 at batch 256


def info_nce(queries_BD: Tensor, keys_BD: Tensor, queue_RD: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of each query with its own key against the queue (equation 1). Rows of unit length."""
    positive = (queries_BD * keys_BD).sum(1, keepdim=True)
    logits = torch.cat([positive, queries_BD @ queue_RD.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def proto_nce(
    queries_BD: Tensor,
    prototypes_KD: Tensor,
    concentrations_K: Tensor,
    assignments_B: Tensor,
    *,
    negatives: int,
    generator: torch.Generator,
) -> Tensor:
    """Cross-entropy of each query with its own prototype (equation 11, one granularity).

    Against the other positives of the batch and `negatives` clusters that are nobody's positive; each column of the
    logits is divided by its own concentration φ.

    Args:
        queries_BD: Unit rows.
        prototypes_KD: Unit rows.
        concentrations_K: φ of each cluster.
        assignments_B: Cluster of each query.
        negatives: Clusters drawn; at most K minus the distinct positives.
        generator: CPU generator of the draw.
    """
    count = len(prototypes_KD)
    chosen = torch.zeros(count, dtype=torch.bool, device=queries_BD.device)
    chosen[assignments_B] = True
    order = torch.rand(count, generator=generator).to(chosen.device).masked_fill_(chosen, -1.0)
    chosen[order.topk(negatives).indices] = True
    logits = queries_BD @ prototypes_KD.T / concentrations_K
    return F.cross_entropy(logits.masked_fill(~chosen, -torch.inf), assignments_B)


class PCL(base.Method):
    """PCL.

    Args:
        backbone: Images to features.
        feature_dim: Dimension of the features.
        hidden_dim: Width of the head's hidden layer; 0 for a linear head (v1).
        dim: Dimension of the embeddings, D.
        key_momentum: m of the momentum encoder.
        queue_length: Keys that are kept as negatives, R.
        temperature: τ of InfoNCE, and the mean of φ.
        clusters: Number of clusters of each granularity.
        negatives: Clusters drawn as negatives in each granularity.
        warmup_epochs: Epochs with InfoNCE alone.
        kmeans_iterations: Lloyd iterations of each E-step.
    """

    queue: Tensor
    position: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        hidden_dim: int,
        dim: int,
        key_momentum: float,
        queue_length: int,
        temperature: float,
        clusters: Sequence[int],
        negatives: int,
        warmup_epochs: int,
        kmeans_iterations: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = heads.projection(feature_dim, hidden_dim, dim)
        self.key_encoder = nn.Sequential(copy.deepcopy(self.backbone), copy.deepcopy(self.head)).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_length, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))
        self.key_momentum = key_momentum
        self.temperature = temperature
        self.clusters = tuple(clusters)
        self.negatives = negatives
        self.warmup_epochs = warmup_epochs
        self.kmeans_iterations = kmeans_iterations
        self._granularities: list[tuple[Tensor, Tensor, Tensor]] = []  # prototypes, concentrations, assignments
        self._keys: Tensor | None = None

    def check(self, images: int) -> None:
        """Every granularity needs as many images as clusters."""
        if max(self.clusters) > images:
            raise ConfigError(
                f"clusters: expected at most {images}, the number of training images; got {max(self.clusters)}; "
                "lower it"
            )

    def before_epoch(self, epoch: int, embed: base.Embed, seed: int) -> None:
        """The E-step: cluster the momentum features of all training images, once for each granularity."""
        if epoch < self.warmup_epochs:
            return
        features = F.normalize(embed(self.key_encoder), dim=1)
        self._granularities = []
        for k in self.clusters:
            found = kmeans.fit(features, k, seed=seed, iterations=self.kmeans_iterations, initialisation="points")
            phi = kmeans.concentration(found.distances, found.assignments, k=k, temperature=self.temperature)
            self._granularities.append((F.normalize(found.centroids, dim=1), phi, found.assignments))

    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class. InfoNCE plus, after the warm-up, the mean ProtoNCE over the granularities."""
        query_view, key_view = views
        queries = F.normalize(self.head(self.backbone(query_view)), dim=1)
        keys = self._shuffled_keys(key_view, generator)
        instance = info_nce(queries, keys, self.queue, temperature=self.temperature)
        self._keys = keys
        logged = {"info_nce": instance.detach()}
        if not self._granularities:
            return instance, logged
        prototype = torch.stack(
            [
                proto_nce(
                    queries,
                    prototypes,
                    concentrations,
                    assignments[indices.to(assignments.device)],
                    negatives=self.negatives,
                    generator=generator,
                )
                for prototypes, concentrations, assignments in self._granularities
            ]
        ).mean()
        return instance + prototype, logged | {"proto_nce": prototype.detach()}

    @torch.no_grad()
    def _shuffled_keys(self, view: Tensor, generator: torch.Generator) -> Tensor:
        order = torch.randperm(len(view), generator=generator).to(view.device)
        groups = view[order].tensor_split(max(1, min(_KEY_GROUPS, len(view) // 2)))
        keys = torch.cat([self.key_encoder(group) for group in groups])
        return F.normalize(keys[order.argsort()], dim=1)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the momentum encoder, then put the batch's keys into the queue in place of the oldest."""
        online = [*self.backbone.parameters(), *self.head.parameters()]
        for key, query in zip(self.key_encoder.parameters(), online, strict=True):
            key.lerp_(query, 1 - self.key_momentum)
        assert self._keys is not None
        start = int(self.position)
        self.queue[start : start + len(self._keys)] = self._keys
        self.position.fill_((start + len(self._keys)) % len(self.queue))
        self._keys = None
