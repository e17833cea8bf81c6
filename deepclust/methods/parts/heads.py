"""What sits on a backbone during pretraining: projection heads, and prototypes with their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.errors import CheckpointError
from deepclust.models import weights


def projection(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """A projection head: linear if `hidden` is 0, else one hidden layer with batch normalisation and ReLU."""
    if hidden == 0:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    )


def load_projection(state: Mapping[str, Tensor]) -> nn.Module:
    """The projection head that a state dict of `projection` belongs to, in eval mode.

    Raises:
        CheckpointError: If the tensors are not exactly those of such a head.
    """
    first, last = ("weight", "weight") if "weight" in state else ("0.weight", "3.weight")
    try:
        hidden, inputs = (0, state[first].shape[1]) if first == last else state[first].shape
        head = projection(inputs, hidden, state[last].shape[0])
        weights.fill(head, state)
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()) or "nothing"
        raise CheckpointError(
            "expected the tensors of a projection head, linear or with one hidden layer, "
            f"got {found}; make the file anew by pretraining"
        ) from error
    return head.eval()


def unit_rows(outputs: Tensor) -> Tensor:
    """Rows of unit length, in float32 at least, whatever autocast made of the network's outputs."""
    return F.normalize(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), dim=1)


def products(rows_ND: Tensor, others_MD: Tensor) -> Tensor:
    """Scalar products (N, M), not in half precision under autocast either.

    They are divided by a temperature, or by the ε of the codes, and that multiplies their rounding.
    """
    with torch.autocast(rows_ND.device.type, enabled=False):
        return rows_ND @ others_MD.T


class Prototypes(nn.Module):
    """K prototypes of unit length, without bias (SwAV, arXiv 2006.09882, section 3.1).

    `normalise` brings the rows back to unit length; it belongs before every forward pass that follows a weight update.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, dim), dim=1))

    def __len__(self) -> int:
        return len(self.weight)

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale each row to unit length, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores (batch, count) of unit embeddings (batch, dim)."""
        return products(embeddings, self.weight)


class PrototypeHeads(nn.ModuleList):
    """Several sets of prototypes for the same embeddings."""

    def __init__(self, counts: Sequence[int], dim: int) -> None:
        super().__init__(Prototypes(count, dim) for count in counts)

    def __iter__(self) -> Iterator[Prototypes]:
        return cast("Iterator[Prototypes]", super().__iter__())

    def exported(self, head: nn.Module) -> dict[str, dict[str, Tensor]]:
        """What `prototype_scores` needs: the head's tensors, and the unit rows of each set under its number."""
        return {
            "projection": {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()},
            "prototypes": {
                str(number): unit_rows(prototypes.weight.detach()).cpu() for number, prototypes in enumerate(self)
            },
        }


@torch.no_grad()
def prototype_scores(head: nn.Module, prototypes_KD: Tensor, features: Tensor) -> Tensor:
    """Scores (batch, K) of images with the prototypes; the largest names an image's prototype.

    Args:
        head: Projection head; used in eval mode, and left in the mode it came in.
        prototypes_KD: Rows of any length: those of a checkpoint were last updated after they were normalised.
        features: The backbone's outputs in eval mode (batch, features).
    """
    mode = head.training
    scores = products(unit_rows(head.eval()(features)), unit_rows(prototypes_KD))
    head.train(mode)
    return scores
