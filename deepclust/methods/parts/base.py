"""The contract of a pretraining method: options, a loss, parameter groups, a check, and hooks with empty defaults."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deepclust import distributed
from deepclust.errors import ConfigError
from deepclust.methods.parts.options import TrainedConfig

Embed = Callable[[nn.Module], Tensor]
"""Applies a module to the centre view of this process's share of the training images, in eval mode and in order."""


class Method(nn.Module, ABC):
    """A backbone with what the method trains around it.

    Whatever outlives a step is in the state dict: a parameter, a buffer or, where the host decides by it in each step,
    extra state (see `nn.Module.get_extra_state`), as reading a buffer back would make it wait for a GPU.

    Attributes:
        name: The method's in params.yaml, and its file's.
        backbone: Images (batch, C, H, W), normalised, to features; the encoder that pretraining is for.
        config: The options, without `auto`.
    """

    name: ClassVar[str] = ""
    backbone: nn.Module
    config: TrainedConfig

    def __init__(self, backbone: nn.Module, config: TrainedConfig) -> None:
        super().__init__()
        undecided = [name for name, value in vars(config).items() if value == "auto"]
        if undecided:
            raise ConfigError(
                f"{', '.join(undecided)}: expected a number, got 'auto'; let the data decide it by config.sized(…)"
            )
        self.backbone, self.config = backbone, config

    @abstractmethod
    def loss(
        self, views: list[Tensor], indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, or of one of the equal parts that the batch of an update is split into.

        So nothing that the next part would see may change in here: what enters a queue is kept until `after_step`.

        Args:
            views: Normalised crops of the batch, each (batch, C, S, S). Under several processes, this one's equal part
                of the batch, which is that of all of them: what depends on the whole batch goes through `distributed`.
            indices: Number of each image in the training set.
            generator: CPU generator of this step, for whatever else is random; in the same state on all processes.

        Returns:
            The loss, whose mean over the processes counts, and scalars worth logging, 0-dim and without gradient. By
            the same name in every method that has it: `embedding_spread` (see `spread`); `loss_to_chance`, the
            classification part of the loss divided by its value for a model that knows nothing; `prototypes_used`, the
            share of the prototypes, or of the batch's codes where those are fewer, that are somebody's strongest code;
            `code_entropy`, the mean entropy of a sample's codes / ln K.
        """

    def check(self, images: int) -> None:
        """Refuse, before any training, a data set of `images` that the method can not be trained on.

        Raises:
            ConfigError: With the numbers and the remedy.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser; by default one with everything that has a gradient."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def bind(self, images: int) -> None:
        """Register the buffers with a row for each of `images` training images; called once, after `check`."""

    def before_epoch(self, epoch: int, embed: Embed, seed: int) -> None:
        """Called before each epoch, with a seed of its own."""

    def before_step(self, step: int) -> None:
        """Called before the first loss of an update."""

    def after_step(self, step: int) -> None:
        """Called after the update."""

    def exported(self) -> dict[str, dict[str, Tensor]]:
        """What later stages need besides the backbone: names of files, and the tensors (on the CPU) of each."""
        return {}


def at_most_images(name: str, wanted: int, images: int) -> None:
    """Refuse an option that can not exceed the number of training images. Raises: ConfigError."""
    if wanted > images:
        raise ConfigError(f"{name}: expected at most the number of training images, {images}; got {wanted}; lower it")


def spread(unit_embeddings_BD: Tensor) -> Tensor:
    """Mean over the dimensions of the batch's standard deviation, times √D: 1 is healthy, 0 is collapse.

    SimSiam (arXiv 2011.10566, section 4.1) shows the same number without the factor, so that 1/√D is healthy.
    """
    embeddings = distributed.gather(unit_embeddings_BD)
    return embeddings.std(0, correction=0).mean() * math.sqrt(embeddings.shape[1])


def share_used(chosen: Tensor, count: int) -> Tensor:
    """Share of `count` prototypes that are chosen at least once, or of the choices where these are fewer."""
    used = torch.zeros(count, dtype=torch.bool, device=chosen.device)
    everybodys = distributed.gather(chosen)
    used.index_fill_(0, everybodys, True)  # an assignment by index would make a GPU wait for its right-hand side
    return used.sum() / min(count, len(everybodys))


def by_view(rows: Tensor, views: int) -> Tensor:
    """Rows (views · batch, dim), as `by_resolution` gives them, as (views, batch, dim)."""
    return rows.view(views, -1, rows.shape[1])


def by_resolution(module: nn.Module, views: list[Tensor]) -> Tensor:
    """Features of all views, (views · batch, dim) in their order, one forward pass for each run of equal resolutions.

    So batch normalisation sees one resolution at a time, and all crops of it together.
    """
    outputs: list[Tensor] = []
    start = 0
    for end in range(1, len(views) + 1):
        if end == len(views) or views[end].shape[-1] != views[start].shape[-1]:
            outputs.append(module(torch.cat(views[start:end])))
            start = end
    return torch.cat(outputs)
