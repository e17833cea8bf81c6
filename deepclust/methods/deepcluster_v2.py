"""DeepCluster-v2, from "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882.

Described in the paper's appendix; the assignments follow DeepCluster, arXiv 1807.05520. Differences from the original
code, all deliberate:
- Before the first epoch the memory bank is filled from plain centre views in eval mode; the original takes a pass over
  augmented crops in train mode.
- An empty cluster moves to the worst served point; the original leaves its old centroid where it was.
- k-means stops when it no longer improves, and may be restarted.
- The bank has one row for each image, by its number; the images that an epoch leaves out keep their older rows.

N training images, B batch, V crops, A crops in the memory bank, K prototypes, D dimension of the embeddings.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import distributed, seeding
from deepclust.clustering import kmeans
from deepclust.config import config
from deepclust.methods.parts import base, heads, options


def assignment_loss(scores_VBK: Tensor, assignments_B: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of every crop's scores, divided by τ, with the assignment of its image; mean over the crops."""
    crops = len(scores_VBK)
    return F.cross_entropy(scores_VBK.flatten(0, 1) / temperature, assignments_B.repeat(crops))


@config
class Config(options.KMeansConfig, options.PrototypesConfig):
    """DeepCluster-v2's options. Prototype head i clusters assign crop i, counted modulo their number."""

    heads: ClassVar[int] = 3  # the published number (arXiv 2006.09882, appendix)


class DeepClusterV2(base.Method):
    """DeepCluster-v2.

    Args:
        backbone: Images to features.
        feature_dim: Dimension of the features.
        config: The options; without `auto`, see `Config.sized`.
    """

    name = "deepcluster_v2"
    config: Config

    bank: Tensor
    assignments: Tensor

    def __init__(self, backbone: nn.Module, feature_dim: int, config: Config) -> None:
        super().__init__(backbone, config)
        self.head = heads.projection(feature_dim, config.hidden_dim, config.dim)
        # The centroids of the last k-means, not trained.
        self.prototypes = heads.PrototypeHeads(config.counts, config.dim).requires_grad_(False)
        self.register_buffer("bank", torch.zeros(len(config.assign_crops), 0, config.dim))
        self.register_buffer("assignments", torch.zeros(len(config.counts), 0, dtype=torch.long))
        self._new: list[tuple[Tensor, Tensor]] = []  # indices (B,) and embeddings (A, B, D) for the bank

    def check(self, images: int) -> None:
        """Every head needs as many images as clusters."""
        base.at_most_images("prototypes", max(map(len, self.prototypes)), images)

    def bind(self, images: int) -> None:
        """Make room for the memory bank (A, N, D) and the assignments (heads, N)."""
        crops, _, dim = self.bank.shape
        self.bank = self.bank.new_zeros(crops, images, dim)
        self.assignments = self.assignments.new_zeros(len(self.assignments), images)

    @torch.no_grad()
    def before_epoch(self, epoch: int, embed: base.Embed, seed: int) -> None:
        """Cluster the memory bank once for each head."""
        if not self.bank.any():
            own = heads.unit_rows(embed(nn.Sequential(self.backbone, self.head)))
            self.bank.copy_(distributed.gather(own, self.bank.shape[1]))
        mine = distributed.share(self.bank.shape[1])
        for number, prototypes in enumerate(self.prototypes):
            found = kmeans.fit(
                self.bank[number % len(self.bank), mine],
                len(prototypes),
                seed=seeding.derive(seed, number),
                iterations=self.config.kmeans_iterations,
                initialisation="points",
                spherical=True,
                restarts=self.config.kmeans_restarts,
                engine=self.config.kmeans_engine,
            )
            prototypes.weight.copy_(found.centroids)
            self.assignments[number] = distributed.gather(found.assignments, self.bank.shape[1])

    def before_step(self, step: int) -> None:
        """Forget embeddings of a step that came to no update."""
        self._new.clear()

    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class. The mean over the prototype heads of the assignment loss; so are the logged scalars."""
        indices = indices.to(self.assignments.device, non_blocking=True)
        embeddings = heads.unit_rows(self.head(base.by_resolution(self.backbone, views)))
        embeddings_V = base.by_view(embeddings.detach(), len(views))
        # One by one: a list of indices would be copied to a GPU, which makes the host wait.
        assigned = torch.stack([embeddings_V[crop] for crop in self.config.assign_crops])
        self._new.append((indices, assigned))
        losses, chances, used = [], [], []
        for prototypes, assignments in zip(self.prototypes, self.assignments[:, indices], strict=True):
            scores = base.by_view(prototypes(embeddings), len(views))
            losses.append(assignment_loss(scores, assignments, temperature=self.config.temperature))
            chances.append(losses[-1].detach() / math.log(len(prototypes)))
            used.append(base.share_used(assignments, len(prototypes)))
        return torch.stack(losses).mean(), {
            "embedding_spread": base.spread(assigned[0]),
            "loss_to_chance": torch.stack(chances).mean(),
            "prototypes_used": torch.stack(used).mean(),
        }

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Write the step's embeddings into the memory bank, for the next epoch's clustering."""
        for indices, embeddings in self._new:
            everybodys = distributed.gather(embeddings.transpose(0, 1)).transpose(0, 1)
            self.bank[:, distributed.gather(indices)] = everybodys
        self._new.clear()

    def exported(self) -> dict[str, dict[str, Tensor]]:
        """See the base class. What `heads.prototype_scores` needs."""
        return self.prototypes.exported(self.head)
