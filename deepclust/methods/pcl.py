"""Prototypical Contrastive Learning of Unsupervised Representations (PCL), arXiv 2005.04966.

Differences from the original code, all deliberate:
- A cluster is one column of the prototype logits, also when several samples of the batch share it; the original repeats
  the column, so that a sample's own prototype counts among its negatives.
- Negatives are drawn for the whole batch by one vectorised draw, not by loops over samples.
- The number of negatives is a parameter of its own; the original takes the queue's length.
- Those of MoCo, which it builds on.

B batch, N training images, K clusters, D dimension of the embeddings.
"""

from __future__ import annotations

from typing import Annotated, Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import distributed
from deepclust.clustering import kmeans
from deepclust.config import Auto, Count, Flag, Natural, NotEmpty, config
from deepclust.errors import ConfigError
from deepclust.methods.parts import base, heads, options, sizes
from deepclust.methods.parts.momentum_contrast import MomentumConfig, MomentumContrast


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

    Raises:
        ConfigError: If the positives leave fewer clusters than `negatives`.
    """
    count = len(prototypes_KD)
    chosen = torch.zeros(count, dtype=torch.bool, device=queries_BD.device)
    positives = distributed.gather(assignments_B)
    chosen.index_fill_(0, positives, True)  # an assignment by index would make a GPU wait for its right-hand side
    # Counting makes a GPU wait, so only where the batch does not leave enough in any case.
    if negatives > count - len(positives) and negatives > (left := count - int(chosen.sum())):
        raise ConfigError(
            f"negatives: expected at most {left}, the clusters of {count} that are nobody's positive in a batch of "
            f"{len(positives)}; got {negatives}; lower it, or raise clusters"
        )
    order = torch.rand(count, generator=generator).to(chosen.device, non_blocking=True).masked_fill_(chosen, -1.0)
    chosen.index_fill_(0, order.topk(negatives).indices, True)
    logits = heads.products(queries_BD, prototypes_KD) / concentrations_K
    return F.cross_entropy(logits.masked_fill(~chosen, -torch.inf), assignments_B)


class Clustering(nn.Module):
    """One granularity's clusters, as buffers.

    Attributes:
        centroids: (K, D), as k-means left them.
        prototypes: (K, D), the same as unit rows.
        concentrations: (K,), φ.
        assignments: (N,) int64, the cluster of each training image; no rows before `bind`.
    """

    centroids: Tensor
    prototypes: Tensor
    concentrations: Tensor
    assignments: Tensor

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.zeros(count, dim))
        self.register_buffer("prototypes", torch.zeros(count, dim))
        self.register_buffer("concentrations", torch.zeros(count))
        self.register_buffer("assignments", torch.zeros(0, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.centroids)

    def bind(self, images: int) -> None:
        """Make room for as many assignments."""
        self.assignments = self.assignments.new_zeros(images)

    def replace(self, found: kmeans.Clusters, *, temperature: float) -> None:
        """Take over a new k-means; the concentrations are of the distances to its centroids as they are."""
        self.centroids.copy_(found.centroids)
        self.prototypes.copy_(F.normalize(found.centroids, dim=1))
        self.concentrations.copy_(
            kmeans.concentration(found.distances, found.assignments, k=len(self), temperature=temperature)
        )
        self.assignments.copy_(distributed.gather(found.assignments, len(self.assignments)))


@config
class Config(options.KMeansConfig, MomentumConfig):
    """PCL's options."""

    clusters: Annotated[tuple[Count, ...], NotEmpty] | Auto = "auto"
    """Number of clusters of each granularity, K; auto: see docs/methods/sizes.md."""
    negatives: Count | Auto = "auto"
    """Clusters that are drawn as negatives in each granularity; auto: as many as a batch must leave."""
    warmup_epochs: Natural = 20
    """First epochs, with InfoNCE alone."""
    spherical: Flag = False
    """Whether k-means keeps its centroids at unit length."""
    kmeans_every: Count = 1
    """Epochs from one E-step to the next."""
    kmeans_warm_start: Flag = False
    """Whether each E-step but the first begins from the centroids of the last one, in a single run."""

    def sized(self, *, images: int, image_size: int) -> Self:
        """See the base class."""
        clusters = sizes.clusters(images, self.part) if self.clusters == "auto" else self.clusters
        negatives = sizes.negatives(clusters, self.part) if self.negatives == "auto" else self.negatives
        return super().sized(images=images, image_size=image_size).replaced(clusters=clusters, negatives=negatives)

    def _check(self) -> None:
        super()._check()
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} must be below epochs {self.epochs}: the prototypes would never be "
                "used; lower it or raise epochs"
            )
        if self.clusters == "auto":
            return
        if len(set(self.clusters)) < len(self.clusters):
            raise ValueError(f"clusters must be distinct, got {list(self.clusters)}: equal ones cluster alike")
        most = min(self.clusters) - self.part
        negatives = most if self.negatives == "auto" else self.negatives
        if not 1 <= negatives <= most:
            raise ValueError(
                f"negatives must be at least 1, and with {self.part} images at once not exceed {most}: the smallest of "
                f"clusters is {min(self.clusters)}, and as many clusters as images may be positives; got "
                f"{negatives}; raise clusters, or lower negatives or batch_size"
            )


class PCL(MomentumContrast):
    """PCL: MoCo's loss, and after the warm-up ProtoNCE with the clusters of each granularity.

    Args:
        backbone: Images to features.
        feature_dim: Dimension of the features.
        config: The options; without `auto`, see `Config.sized`.
    """

    name = "pcl"
    config: Config

    def __init__(self, backbone: nn.Module, feature_dim: int, config: Config) -> None:
        super().__init__(backbone, feature_dim, config)
        assert config.clusters != "auto"
        assert config.negatives != "auto"
        self.negatives = config.negatives
        self.clusterings = nn.ModuleList([Clustering(count, config.dim) for count in config.clusters])
        self.clustered = False  # no buffer: every step asks for it, and would wait for the GPU

    def check(self, images: int) -> None:
        """Every granularity needs as many images as clusters."""
        base.at_most_images("clusters", max(map(len, self._granularities())), images)

    def bind(self, images: int) -> None:
        """Make room for the assignments of all images."""
        for clustering in self._granularities():
            clustering.bind(images)

    def before_epoch(self, epoch: int, embed: base.Embed, seed: int) -> None:
        """The E-step: cluster the momentum features of all training images, once for each granularity."""
        if epoch < self.config.warmup_epochs or (epoch - self.config.warmup_epochs) % self.config.kmeans_every:
            return
        features = F.normalize(embed(self.key_encoder), dim=1)
        warm = self.config.kmeans_warm_start and self.clustered
        for clustering in self._granularities():
            found = kmeans.fit(
                features,
                len(clustering),
                seed=seed,
                iterations=self.config.kmeans_iterations,
                initialisation="points",
                spherical=self.config.spherical,
                restarts=1 if warm else self.config.kmeans_restarts,
                initial=clustering.centroids if warm else None,
                engine=self.config.kmeans_engine,
            )
            clustering.replace(found, temperature=self.config.temperature)
        self.clustered = True

    def get_extra_state(self) -> Tensor:
        """Whether there are clusters yet, for the state dict."""
        return torch.tensor(self.clustered)

    def set_extra_state(self, state: Any) -> None:
        """Take over whether there are."""
        self.clustered = bool(state)

    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class. InfoNCE plus, after the warm-up, the mean ProtoNCE over the granularities.

        Raises:
            ConfigError: If a group of keys would have a single row, or the negatives of a batch are too few.
        """
        queries, instance, logged = self.contrast(views, generator)
        if not self.clustered:
            return instance, logged
        prototype = torch.stack(
            [
                proto_nce(
                    queries,
                    clustering.prototypes,
                    clustering.concentrations,
                    clustering.assignments[indices.to(queries.device, non_blocking=True)],
                    negatives=self.negatives,
                    generator=generator,
                )
                for clustering in self._granularities()
            ]
        ).mean()
        return instance + prototype, logged | {"proto_nce": prototype.detach()}

    def _granularities(self) -> list[Clustering]:
        return cast("list[Clustering]", list(self.clusterings))
