"""The newest embeddings of the last batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Queue(nn.Module):
    """The last `length` rows that were pushed, for each of `shape` queues side by side; all state is in the state dict.

    Attributes:
        rows: (*shape, length, D); unit rows by chance before the first push.
        pushed: Rows pushed so far; the host's own number, so that asking for it waits for no GPU.
    """

    rows: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(shape), dim=-1))
        self.pushed = 0

    def get_extra_state(self) -> Tensor:
        """`pushed`, for the state dict."""
        return torch.tensor(self.pushed)

    def set_extra_state(self, state: Any) -> None:
        """Take over `pushed`."""
        self.pushed = int(state)

    @property
    def length(self) -> int:
        """Number of places."""
        return self.rows.shape[-2]

    def full(self) -> bool:
        """Whether as many rows were pushed as there are places."""
        return self.pushed >= self.length

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Put rows (*shape, count, D) in the places of the oldest."""
        count = rows.shape[-2]
        assert count <= self.length, f"a batch of {count} rows is longer than the queue of {self.length}"
        places = (self.pushed + torch.arange(count, device=self.rows.device)) % self.length
        self.rows.index_copy_(-2, places, rows)
        self.pushed += count
