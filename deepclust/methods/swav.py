"""Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (SwAV), arXiv 2006.09882.

Differences from the original code, all deliberate:
- Sinkhorn runs in the log domain and in float64, so it neither overflows nor divides in half precision.
- Frozen prototypes get no gradient at all, so neither weight decay nor momentum moves them.
- Codes can be made hard for the first steps.

B batch, V crops, A crops that codes are computed for, K prototypes, D dimension of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import distributed
from deepclust.config import Auto, Count, Natural, Positive, config
from deepclust.errors import ConfigError
from deepclust.methods.parts import base, heads, options, sinkhorn, sizes
from deepclust.methods.parts.queue import Queue


def swapped_loss(scores: Sequence[Tensor], codes: dict[int, Tensor], *, temperature: float) -> Tensor:
    """Predict the code of one crop from the scores of every other (section 3.1, equations 1 and 2; multi-crop, eq. 6).

    Args:
        scores: For each crop, scores (B, K).
        codes: For each assign crop, its codes (B, K).
        temperature: τ of the softmax over the prototypes.

    Returns:
        Mean over assign crops of the mean over the other crops of −Σ_k q_k log softmax(s / τ)_k.
    """
    log_probabilities = [F.log_softmax(score / temperature, dim=1) for score in scores]
    losses = []
    for assign_crop, code in codes.items():
        others = [
            -(code * log_probability).sum(1).mean()
            for crop, log_probability in enumerate(log_probabilities)
            if crop != assign_crop
        ]
        losses.append(torch.stack(others).mean())
    return torch.stack(losses).mean()


def harden(codes_BK: Tensor) -> Tensor:
    """One-hot rows of each code's largest entry."""
    return F.one_hot(codes_BK.argmax(1), codes_BK.shape[1]).to(codes_BK.dtype)


@config
class Config(options.PrototypesConfig):
    """SwAV's options; their usual values are those of ImageNet (the paper's appendix)."""

    epsilon: Positive = 0.05
    """Entropy weight ε of the codes, above 0; lower it if training collapses."""
    sinkhorn_iterations: Count = 3
    """Alternations for the codes."""
    freeze_prototypes_steps: Natural = 313
    """First updates, in which the prototypes do not move."""
    hard_assignment_steps: Natural = 0
    """First updates, in which a code is the one-hot of its largest entry."""
    queue_length: Natural | Auto = "auto"
    """Embeddings of earlier batches, for each assign crop, that take part in the codes of a batch once there are so
    many (section 4, "small batches"); 0 for none; auto: see docs/methods/sizes.md."""
    queue_start_epoch: Natural = 15
    """Epoch in which the queue begins to fill."""

    def sized(self, *, images: int, image_size: int) -> Self:
        """See the base class. What would never take effect is refused: a queue that never fills, or frozen
        prototypes and hard codes that last the whole run."""
        decided = super().sized(images=images, image_size=image_size)
        updates = images // self.batch_size
        pushed = max(0, self.epochs - self.queue_start_epoch) * updates * self.batch_size
        queue = self.queue_length
        if queue == "auto":
            wanted = sizes.swav_queue(max(decided.counts), self.batch_size, images, part=self.part)
            queue = wanted if wanted < pushed else 0
        if queue >= max(1, pushed):
            raise ConfigError(
                f"queue_length: from queue_start_epoch {self.queue_start_epoch} on, {pushed} embeddings enter a queue "
                f"of {queue}, so it would never be used; start it earlier, shorten it, or set queue_length to 0"
            )
        for name in ("freeze_prototypes_steps", "hard_assignment_steps"):
            if getattr(self, name) >= max(1, self.epochs * updates):
                raise ConfigError(
                    f"{name}: expected less than the {self.epochs * updates} updates of the run, got "
                    f"{getattr(self, name)}; lower it"
                )
        return decided.replaced(queue_length=queue)

    def _check(self) -> None:
        super()._check()
        self._check_queue(self.queue_length)


class SwAV(base.Method):
    """SwAV.

    Args:
        backbone: Images to features.
        feature_dim: Dimension of the features.
        config: The options; without `auto`, see `Config.sized`.
    """

    name = "swav"
    config: Config

    def __init__(self, backbone: nn.Module, feature_dim: int, config: Config) -> None:
        super().__init__(backbone, config)
        assert config.queue_length != "auto"
        self.head = heads.projection(feature_dim, config.hidden_dim, config.dim)
        self.prototypes = heads.PrototypeHeads(config.counts, config.dim)
        self.queue = Queue(len(config.assign_crops), config.queue_length, config.dim)
        self.epoch = 0  # no buffer: every step asks for it, and would wait for the GPU
        self._hard = self._filling = self._use_queue = False
        self._new: list[Tensor] = []  # embeddings (A, B, D) that enter the queue after the step

    def before_epoch(self, epoch: int, embed: base.Embed, seed: int) -> None:
        """Remember the epoch, which decides when the queue begins to fill."""
        self.epoch = epoch

    def get_extra_state(self) -> Tensor:
        """The epoch, for the state dict: a run may go on in the middle of one."""
        return torch.tensor(self.epoch)

    def set_extra_state(self, state: Any) -> None:
        """Take over the epoch."""
        self.epoch = int(state)

    def before_step(self, step: int) -> None:
        """Freeze or normalise the prototypes; decide how the codes of this step are made."""
        frozen = step < self.config.freeze_prototypes_steps
        for prototypes in self.prototypes:
            prototypes.requires_grad_(not frozen)
            if frozen:
                prototypes.weight.grad = None
            else:
                prototypes.normalise()
        self._hard = step < self.config.hard_assignment_steps
        self._filling = self.queue.length > 0 and self.epoch >= self.config.queue_start_epoch
        self._use_queue = self._filling and self.queue.full()
        self._new.clear()

    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class. The mean over the prototype heads of the swapped loss; so are the logged scalars."""
        embeddings = heads.unit_rows(self.head(base.by_resolution(self.backbone, views)))
        embeddings_V = base.by_view(embeddings.detach(), len(views))
        # One by one: a list of indices would be copied to a GPU, which makes the host wait.
        assigned = torch.stack([embeddings_V[crop] for crop in self.config.assign_crops])
        if self._filling:
            self._new.append(assigned)
        losses, parts = [], []
        for prototypes in self.prototypes:
            scores = prototypes(embeddings).chunk(len(views))
            soft = self._codes(prototypes, scores)
            codes = {crop: harden(code) for crop, code in soft.items()} if self._hard else soft
            losses.append(swapped_loss(scores, codes, temperature=self.config.temperature))
            chance = math.log(len(prototypes))
            every_code = torch.cat(list(soft.values()))
            parts.append(
                {
                    "loss_to_chance": losses[-1].detach() / chance,
                    "prototypes_used": base.share_used(every_code.argmax(1), len(prototypes)),
                    "code_entropy": torch.special.entr(every_code).sum(1).mean() / chance,
                }
            )
        logged = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        return torch.stack(losses).mean(), {"embedding_spread": base.spread(assigned[0])} | logged

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Put the step's embeddings into the queue in place of the oldest."""
        if self._new:
            everybodys = [distributed.gather(new.transpose(0, 1)).transpose(0, 1) for new in self._new]
            self.queue.push(torch.cat(everybodys, dim=1))
        self._new.clear()

    def exported(self) -> dict[str, dict[str, Tensor]]:
        """See the base class. What `heads.prototype_scores` needs."""
        return self.prototypes.exported(self.head)

    @torch.no_grad()
    def _codes(self, prototypes: heads.Prototypes, scores: Sequence[Tensor]) -> dict[int, Tensor]:
        """Codes of the batch for each assign crop, before any of them is made hard."""
        codes = {}
        for number, crop in enumerate(self.config.assign_crops):
            # The queue holds embeddings: scores of today's prototypes with the embeddings of then. It is the same on
            # all processes, and each adds its share of it to the batch.
            mine = distributed.share(self.queue.length)
            earlier = [prototypes(self.queue.rows[number, mine])] if self._use_queue else []
            all_codes = sinkhorn.codes(
                torch.cat([scores[crop], *earlier]),
                epsilon=self.config.epsilon,
                iterations=self.config.sinkhorn_iterations,
            )
            codes[crop] = all_codes[: len(scores[crop])]
        return codes
